"""A refiner, alone and after a base: tiny ones of random weights, against diffusers."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import sdrt
from sdrt.errors import UsageError
from sdrt.runtime import GenerationOptions
from sdrt.runtime.text.conditioning import build_time_ids

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PROMPT = "a red circle on a blue background"
NEGATIVE = "a green cross"
STEPS, SIDE = 10, 32


@pytest.fixture(scope="module")
def refiner(tiny_refiner_bundle):
    with sdrt.load(tiny_refiner_bundle, backend="onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def base(tiny_xl_bundle):
    with sdrt.load(tiny_xl_bundle, backend="onnxruntime") as loaded:
        yield loaded


def read_parts(folder):
    """The parts of a checkpoint as diffusers' pipelines take them."""
    kinds = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    parts = {
        name: getattr(transformers, kind).from_pretrained(folder / name).eval()
        for name, kind in kinds.items()
        if (folder / name).is_dir()
    }
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        if (folder / name).is_dir():
            parts[name] = transformers.CLIPTokenizer.from_pretrained(
                str(folder / name), pad_token=pad, model_max_length=32
            )
    parts["unet"] = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    parts["vae"] = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    return parts


def run_diffusers(kind, parts, own, *, seed=0, generator=None, **arguments):
    """Images of one of diffusers' pipelines with our scheduler, as an array."""
    config = own.scheduler_config
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    options = {"text_encoder": None, "tokenizer": None, "add_watermarker": False}
    if "text_encoder" not in parts:
        options |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    pipe = getattr(diffusers, kind)(**{**options, **parts}, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=PROMPT,
        generator=generator or torch.Generator("cpu").manual_seed(seed),
        **{
            "num_inference_steps": STEPS,
            "output_type": "np",
            "guidance_scale": 7.5,
            **arguments,
        },
    ).images


@pytest.fixture(scope="module")
def refine(tiny_refiner):
    """diffusers' image to image with the refiner's parts."""
    parts = read_parts(tiny_refiner)

    def run(own, **arguments):
        return run_diffusers("StableDiffusionXLImg2ImgPipeline", parts, own, **arguments)

    return run


@pytest.fixture(scope="module")
def begin(tiny_xl):
    """diffusers' text to image with the base's parts."""
    parts = read_parts(tiny_xl)

    def run(own, **arguments):
        return run_diffusers("StableDiffusionXLPipeline", parts, own, **arguments)

    return run


def source():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8))


def decibels(actual, expected, peak=1.0):
    error = np.mean((np.asarray(actual, np.float64) - np.asarray(expected, np.float64)) ** 2)
    return 10 * np.log10(peak**2 / max(error, 1e-12))


SCHEDULERS = ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"]
OPTIONS = {"num_inference_steps": STEPS, "output_type": "np"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_is_that_of_diffusers(refiner, refine, name, seed):
    own, options = refiner.with_scheduler(name), {"image": source(), "strength": 0.3}
    expected = refine(own, seed=seed, **options)
    assert decibels(own(PROMPT, seed=seed, **OPTIONS, **options).images, expected) >= 50


SIZES = {"original_size": (512, 300), "negative_original_size": (100, 90)}
CROPS = {"crops_coords_top_left": (16, 4), "negative_crops_coords_top_left": (1, 2)}


@pytest.mark.parametrize(
    "options",
    [
        {"aesthetic_score": 9.0, "negative_aesthetic_score": 0.0},
        {"negative_prompt": NEGATIVE},
        {"guidance_scale": 1.0},
        {**SIZES, **CROPS},
    ],
    ids=lambda options: "+".join(options)[:40],
)
def test_options_are_those_of_diffusers(refiner, refine, options):
    own, start = refiner.with_scheduler("Euler"), {"image": source(), "strength": 0.7}
    expected = refine(own, **start, **options)
    plain = own(PROMPT, seed=0, **OPTIONS, **start).images
    actual = own(PROMPT, seed=0, **OPTIONS, **start, **options).images
    assert decibels(actual, expected) >= 50 > decibels(plain, expected)


def test_the_scores_of_a_refiner_are_those_of_diffusers_by_default():
    scores = [6.0, 2.5]
    signature = inspect.signature(diffusers.StableDiffusionXLImg2ImgPipeline.__call__)
    names = ("aesthetic_score", "negative_aesthetic_score")
    assert [signature.parameters[name].default for name in names] == scores
    assert build_time_ids(GenerationOptions(), (32, 48), 5)[::-1, -1].tolist() == scores


SWITCH = 0.8


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [*SCHEDULERS, "EulerAncestralDiscreteScheduler"])
def test_two_calls_are_an_ensemble_as_in_diffusers(base, refiner, begin, refine, name, seed):
    """The latents are handed over with their noise, and with what one generator goes on with."""
    first, second = base.with_scheduler(name), refiner.with_scheduler(name)
    latents = begin(first, seed=seed, denoising_end=SWITCH, output_type="latent")
    handed = first(
        PROMPT, seed=seed, denoising_end=SWITCH, num_inference_steps=STEPS, output_type="latent"
    ).images
    assert decibels(handed, latents, np.abs(handed).max()) >= 50
    expected = refine(second, seed=seed, denoising_start=SWITCH, image=latents)
    actual = second(PROMPT, seed=seed, denoising_start=SWITCH, image=latents, **OPTIONS).images
    assert decibels(actual, expected) >= 50
    alone = first(PROMPT, seed=seed, **OPTIONS).images
    assert decibels(alone, expected) < 50


def test_latents_of_an_encoded_image_are_an_image_to_start_from(refiner, refine):
    own = refiner.with_scheduler("Euler")
    latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    options = {"image": torch.from_numpy(latents), "strength": 0.5}
    expected = refine(own, **options)
    assert decibels(own(PROMPT, seed=0, **OPTIONS, **options).images, expected) >= 50


def test_parts_of_a_run_may_be_three(base, begin, refine, refiner):
    """A refiner that stops early hands its own latents over."""
    first, second = base.with_scheduler("Euler"), refiner.with_scheduler("Euler")
    part = {"output_type": "latent", "num_inference_steps": STEPS, "seed": 0}
    latents = first(PROMPT, denoising_end=0.4, **part).images
    expected = refine(
        second,
        image=torch.from_numpy(latents),
        denoising_start=0.4,
        denoising_end=0.8,
        output_type="latent",
    )
    options = {"image": latents, "denoising_start": 0.4, "denoising_end": 0.8}
    actual = second(PROMPT, **part, **options).images
    assert decibels(actual, expected, np.abs(actual).max()) >= 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "is a refiner without a base"),
        ({"target_size": (64, 64), "image": source()}, "target_size is unsupported"),
        ({"denoising_start": 0.8}, "denoising_start requires image"),
        ({"denoising_start": 1.0, "image": source()}, "denoising_start is 1"),
        ({"denoising_end": 0.0, "image": source()}, "denoising_end is 0"),
        (
            {"denoising_start": 0.8, "denoising_end": 0.8, "image": source()},
            "denoising_start 0.8 is not below denoising_end 0.8",
        ),
        ({"denoising_start": 0.8, "strength": 0.3, "image": source()}, "strength with denoising_s"),
        ({"image": np.zeros((1, 4, 8, 8), np.float32), "size": "32x32"}, "are of 64x64, and size"),
        ({"image_latents": np.zeros((1, 3, 4, 4), np.float32)}, "3 channels; .* have 4"),
        ({"image_latents": np.full((1, 4, 4, 4), np.nan, np.float32)}, "holds NaN"),
        ({"image": np.zeros((2, 4, 4, 4), np.float32), "num_images_per_prompt": 3}, "for image 3"),
        ({"aesthetic_score": -1.0, "image": source()}, "aesthetic_score is -1"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_a_refiner_does_not_take_is_refused(refiner, options, message):
    with pytest.raises(UsageError, match=message):
        refiner(PROMPT, num_inference_steps=2, seed=0, **options)


@pytest.mark.parametrize("name", ["aesthetic_score", "negative_aesthetic_score"])
def test_a_score_of_another_model_is_refused(base, name):
    with pytest.raises(UsageError, match=f"{name} is unsupported") as caught:
        base(PROMPT, num_inference_steps=2, **{name: 6.0})
    assert "refiners" in str(caught.value.hint)
