"""A second pass at a higher resolution against diffusers, alone and in flight."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sdrt
from sdrt.errors import UsageError
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.batching.request import RequestCancelled
from sdrt.runtime.hires_options import check_hires
from sdrt.runtime.images import parse_parameters
from sdrt.runtime.options import DEFAULTS
from sdrt.runtime.upscaling import LATENT_UPSCALERS
from sdrt.runtime.vae import encode_pixels

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PROMPT = "a red circle on a blue background"
SECONDS = 60
HIRES = {"num_inference_steps": 6, "seed": 3, "hires_scale": 2.0}
# The kinds of `torch.nn.functional.interpolate` behind A1111's names.
MODES = {
    "Latent": ("bilinear", False),
    "Latent (bicubic antialiased)": ("bicubic", True),
    "Latent (nearest-exact)": ("nearest-exact", False),
}


def psnr(actual, expected):
    error = np.mean((np.asarray(actual, np.float64) - np.asarray(expected, np.float64)) ** 2)
    return 10 * np.log10(1.0 / max(error, 1e-12))


def second_pass_reference(scheduler, num_steps, strength):
    """diffusers' scheduler with the timesteps that A1111 runs of a grid, from their first one."""
    grid = int(num_steps / min(strength, 0.999))
    scheduler.set_timesteps(grid)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index((grid - num_steps) * scheduler.order)
    return scheduler.timesteps[(grid - num_steps) * scheduler.order :]


@pytest.mark.reference
@pytest.mark.parametrize(
    ("scheduler", "upscaler", "steps", "strength"),
    [
        ("EulerDiscreteScheduler", "Latent", 0, 0.7),
        ("DDIMScheduler", "Latent (nearest-exact)", 4, 0.55),
        ("EulerAncestralDiscreteScheduler", "Latent (bicubic antialiased)", 5, 1.0),
        ("DPMSolverMultistepScheduler", "Lanczos", 7, 0.5),
        ("HeunDiscreteScheduler", "Lanczos", 0, 0.4),
    ],
)
def test_both_passes_match_a_loop_of_diffusers(pipe, scheduler, upscaler, steps, strength):
    own = pipe.with_scheduler(scheduler)
    actual = own(
        PROMPT,
        **HIRES,
        hires_steps=steps,
        hires_strength=strength,
        hires_upscaler=upscaler,
        output_type="latent",
    ).images
    first = own(PROMPT, num_inference_steps=6, seed=3, output_type="latent").images
    generator = torch.Generator("cpu").manual_seed(3)
    start = enlarge(own, first, upscaler)
    theirs = getattr(diffusers, scheduler).from_config(dict(own.scheduler_config))
    timesteps = second_pass_reference(theirs, steps or 6, strength)
    noise = torch.randn(start.shape, generator=generator)
    latents = theirs.add_noise(start, noise, timesteps[:1])
    (conditioning,) = own.encode_conditioning(*job_of(own))
    for timestep in timesteps:
        sample = theirs.scale_model_input(latents, timestep).numpy()
        feeds = {"sample": np.repeat(sample, 2, 0), "timestep": np.full(2, timestep, np.float32)}
        output = own.engines["unet"](feeds | conditioning.inputs)["output"]
        negative, positive = torch.from_numpy(output).chunk(2)
        guided = negative + 7.5 * (positive - negative)
        extra = {} if scheduler.startswith(("DDIM", "DPM", "Heun")) else {"generator": generator}
        latents = theirs.step(guided, timestep, latents, **extra).prev_sample
    images = [own.decode_to_array(np.asarray(result)) * 0.5 + 0.5 for result in (actual, latents)]
    assert psnr(*images) >= 50
    assert np.abs(images[0] - own.decode_to_array(np.asarray(start)) * 0.5 - 0.5).max() > 0.05


def job_of(pipe):
    job = pipe.create_job(PROMPT, sdrt.runtime.GenerationOptions(seed=3))
    timelines = [job.get_timeline(request) for request in job.requests]
    return job.requests, timelines, job.options, job.size


def enlarge(pipe, latents, upscaler):
    if upscaler in MODES:
        mode, antialias = MODES[upscaler]
        return torch.nn.functional.interpolate(
            torch.from_numpy(latents), size=(16, 16), mode=mode, antialias=antialias
        )
    image = pipe.decode(latents)[0].resize((128, 128), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1.0
    mean, _ = encode_pixels(pipe.engines["vae_encoder"], pipe.tiling, pixels)
    return torch.from_numpy(mean[None])


@pytest.mark.parametrize(
    ("backend", "upscaler"),
    [
        ("onnxruntime", "Latent"),
        ("onnxruntime", "Lanczos"),
        pytest.param("openvino", "Latent", marks=pytest.mark.rest),
        pytest.param("torch", "Lanczos", marks=pytest.mark.rest),
    ],
)
def test_images_in_flight_have_the_bytes_of_images_alone(shapes, backend, upscaler):
    options = HIRES | {"hires_upscaler": upscaler, "hires_steps": 3}
    # torch's results depend on the size of the batch, so there each call of the model has one size.
    padded = backend == "torch"
    with sdrt.load(shapes, backend=backend, precision="exact") as own:
        alone = own(PROMPT, **options).images[0]
        plain = own(PROMPT, num_inference_steps=9, seed=1).images[0]
        if padded:
            with InflightBatcher(own, rows=8, deterministic=True) as batcher:
                alone = batcher.submit(PROMPT, options)[0].future.result(SECONDS).image
                (handle,) = batcher.submit(PROMPT, {"num_inference_steps": 9, "seed": 1})
                plain = handle.future.result(SECONDS).image
        steps = []
        with InflightBatcher(own, rows=8, deterministic=padded) as batcher:
            handles = [
                *batcher.submit(PROMPT, options, on_step=lambda _, step: steps.append(step)),
                *batcher.submit(PROMPT, {"num_inference_steps": 9, "seed": 1}),
                *batcher.submit("a green square", options | {"seed": 8}),
            ]
            results = [handle.future.result(SECONDS) for handle in handles]
    assert results[0].image.size == (128, 128)
    np.testing.assert_array_equal(results[0].image, alone)
    np.testing.assert_array_equal(results[1].image, plain)
    total = steps[0].total
    assert [step.index for step in steps] == list(range(1, total + 1))
    assert handles[0].evaluations_done == handles[0].num_evaluations == total
    assert {step.latents.shape[-1] for step in steps} == {8, 16}


def test_a_request_is_cancelled_in_its_second_pass(pipe):
    with InflightBatcher(pipe) as batcher:

        def on_step(handle, step):
            if step.latents.shape[-1] == 16:
                handle.cancel()

        (handle,) = batcher.submit(PROMPT, HIRES, on_step=on_step)
        with pytest.raises(RequestCancelled):
            handle.future.result(SECONDS)
        assert 0 < handle.evaluations_done < handle.num_evaluations
        assert not batcher.unfinished()


def test_steps_and_callbacks_count_over_both_passes(pipe):
    called, steps = [], []

    def callback(_, index, timestep, tensors):
        called.append((index, tensors["latents"].shape[-1]))

    euler = pipe.with_scheduler("Euler")
    prompts, options = [PROMPT, "a green square"], HIRES | {"hires_steps": 3}
    result = euler(
        prompts,
        **options,
        on_step=lambda step: steps.append((step.index, step.total)),
    )
    euler(prompts, **options, callback_on_step_end=callback)
    assert called == [(i, 8 if i < 6 else 16) for i in range(9)]
    assert steps == [(i + 1, 9) for i in range(9)]
    *_, last = euler.steps(prompts, **options)
    np.testing.assert_array_equal(euler.decode(last.latents)[1], result.images[1])


@pytest.mark.parametrize(
    ("asked", "size", "hires"),
    [
        ({"hires_scale": 1.5}, (64, 64), (96, 96)),
        ({"hires_scale": 1.3}, (64, 64), (80, 80)),  # 83.2 of which latents are 10 a side
        ({"hires_size": (128, 0)}, (64, 96), (128, 192)),
        ({"hires_size": "0x128"}, (128, 64), (256, 128)),
        ({"hires_size": (96, 64)}, (64, 64), (96, 64)),  # 96x96, cropped
        ({"hires_size": (64, 128)}, (64, 64), (64, 128)),
    ],
)
def test_sizes_follow_a1111(pipe, asked, size, hires):
    options = sdrt.runtime.GenerationOptions(size=size, **asked)
    assert pipe.validate(PROMPT, options).hires.job.size == hires


def test_a_crop_takes_the_middle(pipe):
    """A1111 cuts the enlarged latents, half of what is too much from each side."""
    options = {"num_inference_steps": 2, "seed": 0, "hires_strength": 0.01, "hires_steps": 1}
    cropped = pipe(PROMPT, **options, hires_size=(128, 64), output_type="latent").images[0]
    full = pipe(PROMPT, **options, hires_scale=2, output_type="latent").images[0]
    assert cropped.shape == (4, 8, 16)
    assert np.corrcoef(cropped.ravel(), full[:, 4:12].ravel())[0, 1] > 0.95


def test_the_second_pass_has_its_own_prompt_guidance_and_sampler(pipe):
    base = HIRES | {"hires_steps": 3}
    changes = {
        "hires_prompt": "a green square",
        "hires_negative_prompt": "blue",
        "hires_guidance_scale": 2.0,
        "hires_scheduler": "Euler a",
    }
    plain = pipe(PROMPT, **base, output_type="latent").images
    for name, value in changes.items():
        assert (
            np.abs(pipe(PROMPT, **base, **{name: value}, output_type="latent").images - plain).max()
            > 1e-3
        )
    same = {"hires_prompt": PROMPT, "hires_negative_prompt": "", "hires_guidance_scale": 7.5}
    again = pipe(PROMPT, **base, **same, output_type="latent").images
    np.testing.assert_array_equal(again, plain)


def test_the_file_says_what_a1111_says(pipe):
    (text,) = pipe(
        PROMPT, **HIRES, hires_steps=3, hires_strength=0.5, hires_prompt='a "green" square, small'
    ).parameters
    settings = parse_parameters(text)
    assert settings["Size"] == "64x64"
    assert settings["Denoising strength"] == "0.5"
    assert settings["Hires upscale"] == "2"
    assert settings["Hires steps"] == "3"
    assert settings["Hires upscaler"] == "Latent"
    assert "Hires sampler" not in settings
    (text,) = pipe(PROMPT, num_inference_steps=2, seed=0, hires_size=(96, 64)).parameters
    assert parse_parameters(text)["Hires resize"] == "96x64"
    (text,) = pipe(PROMPT, num_inference_steps=2, seed=0).parameters
    assert "Hires" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hires_steps": 3}, "hires_steps requires hires_scale"),
        ({"hires_scale": 2, "hires_size": (64, 64)}, "both hires_scale and hires_size"),
        ({"hires_scale": 2, "image": Image.new("RGB", (64, 64))}, "image with a hires pass"),
        ({"hires_scale": 2, "sigmas": [3, 1]}, "sigmas with a hires pass"),
        ({"hires_scale": 0.5}, "hires_scale is 0.5"),
        ({"hires_scale": 1.13}, "size 72x72; expected multiples of 16"),
        ({"hires_scale": 2, "hires_strength": 0}, "hires_strength is 0"),
        ({"hires_scale": 2, "hires_strength": 0.001}, "the last of 20000"),
        ({"hires_scale": 2, "hires_upscaler": "R-ESRGAN 9x"}, "unknown upscaler 'R-ESRGAN 9x'"),
        ({"hires_scale": 2, "hires_prompt": ["a", "b"]}, "2 of hires_prompt for 1 prompts"),
        ({"hires_scale": 2, "hires_prompt": "a <lora:x:1>"}, "in the hires_prompt is not applied"),
        ({"hires_size": (0, 0)}, "hires_size is 0x0"),
        ({"hires_scale": 2, "hires_scheduler": "nonsense"}, "nonsense"),
    ],
)
def test_what_does_not_fit_is_refused(pipe, options, message):
    with pytest.raises(UsageError, match=message):
        pipe(PROMPT, **options)


def test_a1111s_names_are_suggested(pipe):
    with pytest.raises(UsageError) as error:
        pipe(PROMPT, hr_scale=2)
    assert "hires_scale" in error.value.hint


def test_a_second_pass_beyond_memory_is_refused(pipe, monkeypatch):
    estimator = type(pipe.memory_estimator)
    monkeypatch.setattr(estimator, "free_bytes", lambda self: 50_000_000)
    with pytest.raises(UsageError, match="512x512 needs about"):
        pipe(PROMPT, num_inference_steps=1, hires_scale=8)


def test_every_latent_upscaler_is_one_of_a1111():
    titles = {upscaler.title: (upscaler.mode, upscaler.antialias) for upscaler in LATENT_UPSCALERS}
    assert MODES.items() <= titles.items()
    assert len(titles) == 6


def test_a_control_image_is_refused():
    options = dict(DEFAULTS) | {"hires_scale": 2.0, "control_image": object()}
    with pytest.raises(UsageError, match="control_image with a hires pass"):
        check_hires(SimpleNamespace(**options), DEFAULTS)
