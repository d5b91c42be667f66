"""What a model predicts: the marks of published files, the options of a build, and what follows."""

import json
import shutil

import numpy as np
import pytest
import torch
from single_files import single_file, tiny_parts

from sdrt import load
from sdrt.bundle import open_bundle
from sdrt.cli import inspect as cli_inspect
from sdrt.cli.build import PREDICTION_TYPES
from sdrt.cli.main import build_parser
from sdrt.errors import CheckpointError, UsageError
from sdrt.export import prediction
from sdrt.export.build import BuildPlan, _announce
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.model_spec import read_model_spec
from sdrt.runtime.samplers.registry import SAMPLERS
from sdrt.runtime.samplers.table import sampler_table

pytestmark = pytest.mark.integration

FAMILIES = ("1.x", "2.x", "2.x base", "XL")
V_PRED, ZTSNR = {"v_pred": torch.empty(0)}, {"ztsnr": torch.empty(0)}
BASE = {"global_step": torch.tensor(875000)}
MARKS = [
    # what is in the file: keys and metadata; by family: what it predicts, zero terminal SNR, side
    ("1.x", {}, {}, "epsilon", False, 512),
    ("1.x", V_PRED, {}, "v_prediction", False, 512),
    ("1.x", BASE, {}, "epsilon", False, 512),
    ("1.x", {}, {"modelspec.prediction_type": "v"}, "v_prediction", False, 512),
    ("1.x", {}, {"modelspec.predict_key": "v"}, "v_prediction", False, 512),
    ("1.x", {}, {"modelspec.prediction_type": "sample"}, "sample", False, 512),
    ("1.x", {}, {"ss_v_parameterization": "True"}, "v_prediction", False, 512),
    ("1.x", {}, {"ss_v_parameterization": "False"}, "epsilon", False, 512),
    (
        *("1.x", {}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}),
        *("v_prediction", True, 512),
    ),
    ("2.x", {}, {}, "v_prediction", False, 768),
    ("2.x", BASE, {}, "epsilon", False, 512),
    ("2.x", {"global_step": torch.tensor([875000.0])}, {}, "epsilon", False, 512),
    ("2.x", {"global_step": torch.tensor(110000)}, {}, "v_prediction", False, 768),
    ("2.x", {**BASE, **V_PRED}, {}, "v_prediction", False, 768),
    ("2.x", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False, 512),
    ("2.x", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False, 512),
    (
        *("2.x", BASE, {"modelspec.architecture": "stable-diffusion-v2-768-v"}),
        *("v_prediction", False, 768),
    ),
    ("XL", {}, {}, "epsilon", False, 1024),
    ("XL", V_PRED, {}, "v_prediction", False, 1024),
    ("XL", {**V_PRED, **ZTSNR}, {}, "v_prediction", True, 1024),
    ("XL", ZTSNR, {}, "epsilon", False, 1024),
    ("XL", V_PRED, {"modelspec.prediction_type": "epsilon"}, "v_prediction", False, 1024),
]


@pytest.fixture(scope="module")
def tensors(tiny):
    vocabulary = len(json.loads((tiny / "tokenizer" / "vocab.json").read_text()))
    return {name: single_file(*tiny_parts(name, vocabulary)) for name in ("1.x", "2.x", "XL")}


@pytest.mark.parametrize(("family", "keys", "metadata", "kind", "zero", "side"), MARKS)
def test_a_file_says_what_it_predicts(family, keys, metadata, kind, zero, side, tensors, written):
    file = written({**tensors[family], **keys}, metadata=metadata or None)
    checkpoint = find_checkpoint(str(file))
    actual, scheduler = checkpoint.prediction, checkpoint.scheduler_config()
    assert (actual.kind, actual.zero_snr) == (kind, zero)
    assert scheduler["prediction_type"] == kind
    assert scheduler.get("rescale_betas_zero_snr", False) is zero
    assert read_model_spec(checkpoint).native_size == (side, side)
    for mark in (*(k for k in keys if k == "v_pred"), *(k for k in metadata if "arch" not in k)):
        if mark != "ss_zero_terminal_snr":
            assert mark in actual.reason


@pytest.mark.parametrize(
    ("keys", "metadata", "message"),
    [
        ({"edm_mean": 1, "edm_std": 1}, {}, "edm_mean, edm_std: its model is parameterized"),
        ({"edm_vpred.sigma_max": 1}, {}, r"edm_vpred\.sigma_max: its model is parameterized"),
        ({}, {"modelspec.prediction_type": "flow"}, "prediction_type='flow'; expected one of"),
    ],
)
def test_another_parameterization_is_refused_by_name(keys, metadata, message, tensors, written):
    ones = {key: torch.ones(1) for key in keys}
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(str(written({**tensors["XL"], **ones}, metadata=metadata or None)))


def test_a_file_without_a_mark_says_how_to_choose(tensors, written):
    checkpoint = find_checkpoint(str(written(tensors["2.x"])))
    assert "--prediction-type epsilon" in str(checkpoint.prediction)
    chosen = checkpoint.with_prediction("epsilon", False)
    assert read_model_spec(chosen).native_size == (512, 512)
    assert chosen.scheduler_config()["prediction_type"] == "epsilon"


def test_an_option_is_stronger_than_a_mark_and_says_so(tensors, written):
    marked = find_checkpoint(str(written({**tensors["XL"], **V_PRED, **ZTSNR})))
    chosen = marked.with_prediction("epsilon", False)
    assert chosen.prediction.kind == "epsilon" and not chosen.prediction.zero_snr
    reason = chosen.prediction.reason
    assert "--prediction-type epsilon, instead of v_prediction" in reason and "v_pred" in reason
    scheduler = chosen.scheduler_config()
    assert scheduler["timestep_spacing"] == "leading"
    assert "rescale_betas_zero_snr" not in scheduler
    agreed = marked.with_prediction("v_prediction", False)
    assert agreed.prediction.zero_snr and "instead" not in agreed.prediction.reason


def test_a_unet_from_a_file_brings_its_mark(tensors, written):
    base = written(tensors["XL"], "base.safetensors")
    unet = {k: t for k, t in tensors["XL"].items() if k.startswith("model.")}
    file = written({**unet, **V_PRED, **ZTSNR}, "unet.safetensors")
    plain = find_checkpoint(str(base))
    assert find_checkpoint(str(base), parts={"unet": str(file)}).prediction.zero_snr
    for folder in (plain.folder, base):
        inputs = find_checkpoint(str(folder), parts={"unet": str(file)})
        assert inputs.scheduler_config()["prediction_type"] == "v_prediction"
    unmarked = written(unet, "unmarked.safetensors")
    assert find_checkpoint(str(base), parts={"unet": str(unmarked)}).prediction.kind == "epsilon"


def test_a_unet_from_a_model_brings_what_its_scheduler_says(tensors, written):
    base = find_checkpoint(str(written(tensors["XL"], "base.safetensors")))
    other = find_checkpoint(str(written({**tensors["XL"], **V_PRED, **ZTSNR}, "other.safetensors")))
    plain = shutil.copytree(other.folder, other.folder.parent / "as_saved")
    (plain / "notes.json").unlink()
    scheduler = json.dumps(other.scheduler_config())
    (plain / "scheduler" / "scheduler_config.json").write_text(scheduler)
    for where in (plain, plain / "unet"):
        inputs = find_checkpoint(str(base.folder), parts={"unet": str(where)})
        assert inputs.prediction.kind == "v_prediction" and inputs.prediction.zero_snr
        assert inputs.scheduler_config()["prediction_type"] == "v_prediction"
    alone = shutil.copytree(plain / "unet", plain.parent / "alone")
    assert (
        find_checkpoint(str(base.folder), parts={"unet": str(alone)}).prediction.kind == "epsilon"
    )


@pytest.mark.reference
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("family", ["1.x", "XL"])
def test_a_scheduler_is_corrected_where_the_reference_corrects_it(family, name, tensors, written):
    """Trainers save schedulers whose settings the pipelines of 1.x and 2.x overrule."""
    diffusers = pytest.importorskip("diffusers")
    model = find_checkpoint(str(written(tensors[family])))
    scheduler = getattr(diffusers, name)(timestep_spacing="leading")
    scheduler.save_pretrained(model.folder / "scheduler")
    (model.folder / "notes.json").unlink()
    actual = find_checkpoint(str(model.folder)).scheduler_config()
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "feature_extractor"))
    if family == "XL":
        parts = dict.fromkeys(("vae", "unet", "text_encoder", "tokenizer"))
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        reference = diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler)
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
        reference = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler)
    expected = reference.scheduler
    expected.set_timesteps(5)
    assert actual.get("clip_sample") == expected.config.get("clip_sample")
    assert np.array_equal(sampler_table(actual, 5).timesteps, expected.timesteps.numpy())


@pytest.mark.parametrize("family", ["1.x", "2.x", "XL"])
def test_options_hold_for_folders_too(family, tensors, written):
    folder = find_checkpoint(str(find_checkpoint(str(written(tensors[family]))).folder))
    for kind in PREDICTION_TYPES:
        assert folder.with_prediction(kind, False).scheduler_config()["prediction_type"] == kind
    assert folder.with_prediction(None, False) is folder
    with pytest.raises(UsageError, match=r"--zero-snr .*add --prediction-type v_prediction"):
        folder.with_prediction("epsilon", True)


@pytest.mark.reference
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_with_zero_snr_the_reference_starts_from_pure_noise(name):
    """Whatever the scheduler was, diffusers reads what it becomes."""
    diffusers = pytest.importorskip("diffusers")
    chosen = prediction.Prediction("v_prediction", True, "")
    stored = {"_class_name": name, "beta_schedule": "scaled_linear", "steps_offset": 1}
    config = prediction.scheduler_with(stored, chosen)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(10)
    assert float(scheduler.timesteps[0]) == 999
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    assert scheduler.config.prediction_type == "v_prediction"


def test_choice_and_reason_are_printed_stored_and_shown(tiny, tiny_bundle, tmp_path, caplog):
    caplog.set_level("INFO", "sdrt.build")
    checkpoint = find_checkpoint(str(tiny))
    _announce(checkpoint, read_model_spec(checkpoint), BuildPlan(str(tiny)), tmp_path / "bundle")
    said = f"predicts epsilon ({checkpoint.prediction.reason})"
    assert any(record.getMessage().startswith(said) for record in caplog.records)
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest.prediction == str(checkpoint.prediction)
    described = cli_inspect.describe(bundle)
    assert described["prediction"] == bundle.manifest.prediction
    assert said in cli_inspect.text_from_bundles([described])


@pytest.mark.slow
def test_a_bundle_predicts_what_was_chosen(tiny, tmp_path, build_once):
    options = {"prediction_type": "v_prediction", "zero_snr": True, "sizes": ((32, 32),)}
    folder = build_once(str(tiny), tmp_path / "bundle", **options)
    bundle = open_bundle(folder)
    assert bundle.manifest.prediction.startswith("v_prediction with zero terminal SNR (--pred")
    scheduler = bundle.json("scheduler/scheduler_config.json")
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
    with load(str(folder)) as pipe:
        image = pipe("a circle", num_inference_steps=2, seed=0).images[0]
    assert np.asarray(image).std() > 0


def test_a_manifest_without_a_prediction_is_still_read(tiny_bundle, tmp_path):
    from sdrt.bundle.manifest import MANIFEST, manifest_from_json

    raw = json.loads((tiny_bundle / MANIFEST).read_text())
    del raw["prediction"]
    assert manifest_from_json(raw, tiny_bundle / MANIFEST).prediction == ""


def test_the_command_line_names_kinds_that_are_known():
    assert PREDICTION_TYPES == prediction.KINDS
    args = build_parser().parse_args(["build", "--model", "x", "--prediction-type", "sample"])
    assert (args.prediction_type, args.zero_snr) == ("sample", False)
