"""Models that are fed the guidance scale, against the reference pipelines."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers_images import load_parts
from safetensors.torch import save_file
from saved import PROMPT, generate_image, psnr, saved

import sdrt
from sdrt.bundle import open_bundle
from sdrt.cli.verify import run_checks
from sdrt.engine import select_backend
from sdrt.errors import UsageError
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.embedded_guidance import GUIDANCE, guidance_embedding
from sdrt.runtime.options import GenerationOptions

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def model(embedded, tiny, tmp_path_factory):
    """A distilled model's reference pipeline, and its folder; text and VAE are nearly `tiny`'s."""
    folder = tmp_path_factory.mktemp("distilled") / "model"
    parts = load_parts(tiny)
    del parts["unet"]
    parts["vae"].decoder.conv_out.weight.data *= 16  # else its images are nearly one grey
    return saved(embedded, folder, "LCM", **parts), folder


@pytest.fixture(scope="module")
def bundle(model, build_once):
    return build_once(str(model[1]), model[1].parent / "bundle", feature_reuse=0)


@pytest.fixture(scope="module")
def pipe(bundle):
    with sdrt.load(bundle, backend="onnxruntime") as loaded:
        yield loaded


@pytest.mark.parametrize("width", [8, 33, 256])
def test_the_embedding_is_the_references(model, width):
    for scale in (1.0, 1.5, 7.5, 30.0):
        expected = model[0].get_guidance_scale_embedding(torch.tensor([scale - 1.0]), width)
        np.testing.assert_allclose(guidance_embedding(scale, width), expected[0], atol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 1.5, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_images_match_diffusers(pipe, model, scale, steps):
    options = {"num_inference_steps": steps, "guidance_scale": scale}
    actual = pipe(PROMPT, seed=3, **options).images[0]
    assert psnr(actual, generate_image(model[0], 3, **options)) >= 50.0


def test_other_samplers_are_those_of_the_general_pipeline(pipe, model):
    parts = {**model[0].components, "scheduler": diffusers.DDIMScheduler(clip_sample=False)}
    general = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    general.set_progress_bar_config(disable=True)
    own = pipe.with_scheduler(json.loads(general.scheduler.to_json_string()))
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": "two"}
    actual = own(PROMPT, seed=0, **options).images[0]
    assert psnr(actual, generate_image(general, 0, **options)) >= 50.0


def test_images_in_flight_share_calls_whatever_their_scale(pipe):
    scales = (1.0, 3.0, 8.0)
    alone = [
        pipe(PROMPT, seed=0, num_inference_steps=3, guidance_scale=s).images[0] for s in scales
    ]
    with InflightBatcher(pipe) as engine:
        options = [{"num_inference_steps": 3, "guidance_scale": s, "seed": 0} for s in scales]
        handles = [engine.submit(PROMPT, item)[0] for item in options]
        together = [handle.future.result().image for handle in handles]
    assert all(psnr(a, b) >= 50.0 for a, b in zip(alone, together, strict=True))
    assert psnr(alone[0], alone[2]) < 45.0


def test_one_row_is_computed(pipe):
    job = pipe.create_job(PROMPT, GenerationOptions(guidance_scale=8.0))
    assert (job.guidance.scales == 1.0).all()
    (step,) = pipe.steps(PROMPT, num_inference_steps=1, guidance_scale=8.0)
    assert len(step.latents) == 1


def test_a_negative_prompt_changes_nothing_and_is_logged(pipe, caplog):
    options = {"seed": 0, "num_inference_steps": 2}
    with_one = pipe(PROMPT, negative_prompt="two", **options).images[0]
    assert "ignored" in caplog.text
    assert with_one.tobytes() == pipe(PROMPT, **options).images[0].tobytes()


@pytest.mark.parametrize(
    "option", [{"guidance_interval": (0.2, 0.8)}, {"guidance_rescale": 0.5}], ids=str
)
def test_what_has_no_meaning_is_refused_by_name(pipe, option):
    with pytest.raises(UsageError, match=next(iter(option))):
        pipe(PROMPT, **option)


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_backends_agree(pipe, bundle, backend):
    with sdrt.load(bundle, backend=backend) as other:
        options = {"seed": 0, "num_inference_steps": 2, "guidance_scale": 6.0}
        one, two = (item(PROMPT, **options).images[0] for item in (pipe, other))
    assert psnr(one, two) >= (35.0 if backend == "openvino" else 50.0)  # it may run in bfloat16


def test_features_are_reused(pipe):
    options = {"seed": 0, "num_inference_steps": 4, "guidance_scale": 6.0}
    full, reused = (pipe(PROMPT, **options, feature_reuse=n).images[0] for n in (1, 2))
    assert 15.0 < psnr(full, reused) < 120.0


def test_a_lora_acts_on_the_embedding(pipe, model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    layer = model[0].unet.time_embedding.cond_proj
    down = torch.randn(2, layer.in_features, generator=generator)
    up = torch.randn(layer.out_features, 2, generator=generator)
    name = "unet.time_embedding.cond_proj.lora_{}.weight"
    save_file({name.format("A"): down, name.format("B"): up}, tmp_path / "x.safetensors")
    options = {"num_inference_steps": 2, "guidance_scale": 6.0}
    before = pipe(PROMPT, seed=0, **options).images[0]
    pipe.set_lora({tmp_path / "x.safetensors": 1.0})
    layer.weight.data += up @ down
    try:
        actual = pipe(PROMPT, seed=0, **options).images[0]
        assert psnr(actual, generate_image(model[0], 0, **options)) >= 50.0
        assert psnr(actual, before) < 45.0
    finally:
        pipe.set_lora({})
        layer.weight.data -= up @ down


def test_the_bundle_verifies(bundle):
    missed = [
        c for c in run_checks(open_bundle(bundle), select_backend("onnxruntime", 0)) if not c.passed
    ]
    assert not missed


def test_the_manifest_says_so(bundle):
    inputs = open_bundle(bundle).manifest.components["unet"].inputs
    assert {spec.name: spec.shape for spec in inputs}[GUIDANCE] == ("rows", 32)
