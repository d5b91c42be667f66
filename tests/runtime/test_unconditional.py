"""Unconditional pixel models: built, validated and run without a prompt, as diffusers does."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pixel_configs import DDPM, SMALL
from safetensors.torch import load_file, save_file

import sdrt
from sdrt.bundle import open_bundle
from sdrt.cli.main import main
from sdrt.errors import CheckpointError, UsageError
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.runtime.batching.engine import InflightBatcher

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
# Two stages, one with attention: the export takes half as long as SMALL's.
TINY = {
    **SMALL,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
# As google/ddpm-cifar10-32 and google/ddpm-cat-256 publish them.
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "variance_type": "fixed_large",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder as diffusers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pixels") / "model"
    unet = diffusers.UNet2DModel(**{**TINY, **DDPM})
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler.from_config(SCHEDULER)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory, build_once):
    return build_once(str(model), tmp_path_factory.mktemp("pixels") / "bundle")


@pytest.fixture(scope="module")
def pixels(bundle):
    with sdrt.load(bundle, backend="onnxruntime") as loaded:
        yield loaded


def decibels(own, expected, steps, seed):
    *_, last = own.steps(num_inference_steps=steps, seed=seed)
    actual = np.clip(own.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)
    return 10 * np.log10(1.0 / max(np.mean((actual.astype(np.float64) - expected) ** 2), 1e-12))


# With random weights clipped DDIM is chaotic: of more steps the reference differs from itself, by
# 16 dB at 100, for noise that differs by 1e-6.
@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("DDPM", 10),
        ("DDPM", 50),
        pytest.param("DDPM", 1000, marks=pytest.mark.slow),
        ("DDIM", 10),
        ("DDIM", 20),
    ],
)
def test_images_match_diffusers(model, pixels, kind, steps):
    scheduler = f"{kind}Scheduler"
    own = pixels.with_scheduler(scheduler)
    assert own.scheduler_config["clip_sample"]
    unet = diffusers.UNet2DModel.from_pretrained(model / "unet")
    reference = getattr(diffusers, f"{kind}Pipeline")(
        unet, getattr(diffusers, scheduler).from_config(own.scheduler_config)
    )
    reference.set_progress_bar_config(disable=True)
    stream = torch.Generator("cpu").manual_seed(3)
    expected = reference(num_inference_steps=steps, generator=stream, output_type="np").images[0]
    assert decibels(own, expected, steps, seed=3) >= 50


def test_the_bundle_is_a_unet_alone(bundle, pixels):
    manifest = open_bundle(bundle).manifest
    assert list(manifest.components) == ["unet"] and manifest.sizes == ((16, 16),)
    assert manifest.parity["psnr"] > 60
    assert sorted(p.name for p in bundle.iterdir() if p.is_dir()) == ["scheduler", "unet"]
    out = pixels(num_inference_steps=3, num_images_per_prompt=5, seed=0)
    assert [image.size for image in out.images] == [(16, 16)] * 5
    assert "CFG" not in out.parameters[0]
    alone = pixels(num_inference_steps=3, seed=3).images[0]
    assert np.abs(np.asarray(alone, int) - np.asarray(out.images[3], int)).max() <= 1


def test_the_command_generates_without_a_prompt(bundle, shapes, tmp_path, capsys):
    arguments = ["run", "--bundle", str(bundle), "--steps", "2", "--seed", "4", "--preview"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    path = capsys.readouterr().out.strip()
    assert path == str(tmp_path / "image-4.png") and Image.open(path).size == (16, 16)
    assert main([arguments[0], "a cat", *arguments[1:]]) == 2
    assert "prompt is unsupported" in capsys.readouterr().err
    assert main(["run", "--bundle", str(shapes), "--steps", "1"]) == 2
    assert "no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["negative_prompt", "image", "clip_skip"])
def test_unsupported_options_are_refused(pixels, option):
    value = {"negative_prompt": "a dog", "image": Image.new("RGB", (16, 16)), "clip_skip": 1}
    with pytest.raises(UsageError, match=f"{option} is unsupported"):
        pixels(num_inference_steps=2, **{option: value[option]})


def test_several_in_flight(pixels):
    expected = pixels(num_inference_steps=3, seed=5).images[0]
    with InflightBatcher(pixels) as engine:
        handles = engine.submit(None, {"num_inference_steps": 3, "seed": 5})
        actual = handles[0].future.result(timeout=60).image
    assert np.abs(np.asarray(actual, int) - np.asarray(expected, int)).max() <= 1


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.slow
def test_one_part_at_the_root_with_early_names(model, bundle, tmp_path):
    """As google/ddpm-cat-256 lies on the hub; one channel of grey is another matter."""
    root = tmp_path / "flat"
    root.mkdir()
    shutil.copyfile(model / "unet" / "config.json", root / "config.json")
    name = "scheduler_config.json"
    shutil.copyfile(model / "scheduler" / name, root / name)
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    for new, old in OLD.items():
        weights = {key.replace(f".{new}.", f".{old}."): value for key, value in weights.items()}
    assert any("proj_attn" in key for key in weights)
    save_file(weights, root / "diffusion_pytorch_model.safetensors")
    again = build_bundle(BuildPlan(str(root), tmp_path / "b"))
    graphs = [(b / "unet" / "model.safetensors").read_bytes() for b in (bundle, again)]
    assert graphs[0] == graphs[1]


@pytest.mark.slow
def test_grey_images(tmp_path):
    folder = tmp_path / "grey"
    unet = diffusers.UNet2DModel(**{**SMALL, "in_channels": 1, "out_channels": 1})
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(folder)
    with sdrt.load(build_bundle(BuildPlan(str(folder), tmp_path / "b", dtype="float16"))) as pipe:
        generated = np.asarray(pipe(num_inference_steps=3, seed=0).images[0])
    assert generated.shape == (16, 16, 3) and (generated[..., 0] == generated[..., 2]).all()


def test_a_class_conditional_model_is_refused(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "classes")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "num_class_embeds": 10}))
    with pytest.raises(CheckpointError, match="num_class_embeds"):
        build_bundle(BuildPlan(str(folder), tmp_path / "b"))
