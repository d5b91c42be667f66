"""Models that are fed more than latents: inpainting and depth, built and compared as images."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_checkpoints import write_tiny

import sdrt
from sdrt.errors import UsageError
from sdrt.runtime.images import depth_to_array

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
TASKS = {"inpainting": {"in_channels": 9}, "depth": {"in_channels": 5}}
PARAMS = ["inpainting", pytest.param("depth", marks=pytest.mark.build)]
SIDE = 32


@pytest.fixture(scope="module", params=PARAMS)
def built(request, tmp_path_factory, embedded, build_once):
    """(task, checkpoint, pipeline) of a tiny model of random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_tiny(folder / "model", embedded, **TASKS[request.param])
    bundle = build_once(str(model), folder / "bundle", sizes=((SIDE, SIDE),))
    with sdrt.load(bundle, backend="onnxruntime") as pipe:
        yield request.param, model, pipe


def reference(kind, model, own, **extra):
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    vae = diffusers.AutoencoderKL.from_config(
        {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        | diffusers.AutoencoderKL.load_config(model / "vae")
    )
    from safetensors.torch import load_file

    vae.load_state_dict(load_file(model / "vae" / "diffusion_pytorch_model.safetensors"))
    config = own.scheduler_config
    pipe = getattr(diffusers, kind)(
        vae=vae.eval(),
        unet=unet.eval(),
        text_encoder=transformers.CLIPTextModel.from_pretrained(model / "text_encoder").eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(
            str(model / "tokenizer"), pad_token="<|endoftext|>", model_max_length=32
        ),
        scheduler=getattr(diffusers, config["_class_name"]).from_config(config),
        **extra,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8))


def mask():
    light = np.zeros((SIDE, SIDE), np.uint8)
    light[8:24, 0:16] = 255
    return Image.fromarray(light)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_images_match_diffusers(built, strength, scheduler):
    task, model, pipe = built
    own = pipe.with_scheduler(scheduler)
    inputs = {"image": image(), "strength": strength}
    if task == "inpainting":
        theirs = reference(
            "StableDiffusionInpaintPipeline",
            model,
            own,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        extra = {"mask_image": mask()}
        options = inputs | extra
    else:
        theirs = reference(
            "StableDiffusionDepth2ImgPipeline",
            model,
            own,
            depth_estimator=None,
            feature_extractor=None,
        )
        depth = np.random.default_rng(1).normal(size=(SIDE // 8, SIDE // 8)).astype(np.float32)
        extra = {"depth_map": torch.from_numpy(depth)[None]}
        options = inputs | {"depth_map": Image.fromarray(depth)}
    expected = theirs(
        prompt="a red circle",
        num_inference_steps=6,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
        **inputs,
        **extra,
    ).images[0]
    *_, last = own.steps("a red circle", num_inference_steps=6, seed=3, **options)
    actual = np.clip(own.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)
    error = np.mean((actual.astype(np.float64) - expected) ** 2)
    assert 10 * np.log10(1.0 / max(error, 1e-12)) >= 50


def test_what_the_model_needs_is_asked_for(built):
    task, _, pipe = built
    expected = "inpainting model" if task == "inpainting" else "requires depth_map"
    with pytest.raises(UsageError, match=expected):
        pipe("a square", num_inference_steps=1)


def test_a_depth_map_for_a_model_without_is_refused(pipe):
    with pytest.raises(UsageError, match="unsupported by this model"):
        pipe("a square", num_inference_steps=1, depth_map=mask())
    with pytest.raises(UsageError, match="one depth"):
        depth_to_array(Image.new("L", (8, 8)), (4, 4))
