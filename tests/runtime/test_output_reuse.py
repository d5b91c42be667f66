"""Output reuse: images equal to diffusers' with a UNet that extrapolates the evaluations which are
left out, which those are, and what is refused.
"""

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.errors import UsageError
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.output_reuse import with_output_reuse
from sdrt.runtime.reuse_schedule import list_sources
from sdrt.runtime.samplers.table import sampler_table

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"
STEPS = 12
GRADIENT = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (8, 8, 56, 40))


class Extrapolating:
    """In place of a UNet's `forward`: runs it at some evaluations, and extrapolates the others by
    their number.
    """

    def __init__(self, forward, every):
        self.forward, self.every, self.evaluation = forward, every, -1
        self.computed = []  # (evaluation, output) of the last two

    def __call__(self, sample, timestep, *args, **kwargs):
        self.evaluation += 1
        interval = (self.every + 1) // 2 if len(self.computed) < 2 else self.every
        if not self.computed or self.evaluation - self.computed[-1][0] == interval:
            output = self.forward(sample, timestep, *args, **kwargs)[0]
            self.computed = [*self.computed[-1:], (self.evaluation, output)]
            return (output,)
        *before, (k, last) = self.computed
        if not before:
            return (last,)
        j, other = before[0]
        return (last + (self.evaluation - k) / (k - j) * (last - other),)


@pytest.fixture(scope="module")
def reference(embedded):
    diffusers = pytest.importorskip("diffusers")
    import torch

    base = diffusers.StableDiffusionPipeline.from_pretrained(embedded).to(dtype=torch.float32)

    def run(kind, own, every, **options):
        pipe = getattr(diffusers, kind)(**base.components)
        pipe.set_progress_bar_config(disable=True)
        config = own.scheduler_config
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        forward = pipe.unet.forward
        pipe.unet.forward = Extrapolating(forward, every)
        seeded = torch.Generator("cpu").manual_seed(0)
        arguments = {"num_inference_steps": STEPS, "output_type": "np", **options}
        try:
            return pipe(PROMPT, generator=seeded, **arguments).images[0]
        finally:
            pipe.unet.forward = forward

    return run


def decibels(own, expected, **options):
    arguments = {"num_inference_steps": STEPS, "seed": 0, "output_type": "np"}
    actual = own(PROMPT, **arguments, **options).images[0]
    return 10 * np.log10(1.0 / max(np.mean((actual.astype(np.float64) - expected) ** 2), 1e-12))


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("scheduler", "every", "options"),
    [
        ("DPMSolverMultistepScheduler", 3, {}),
        ("EulerDiscreteScheduler", 4, {"guidance_scale": 1.0}),
        ("UniPCMultistepScheduler", 5, {}),
        ("PNDMScheduler", 2, {}),
        ("HeunDiscreteScheduler", 3, {}),
        ("DDIMScheduler", 3, {"guidance_rescale": 0.5}),
        ("DPMSolverMultistepScheduler", 2, {"image": GRADIENT, "strength": 0.8}),
    ],
)
def test_images_are_those_of_an_extrapolating_unet(pipe, reference, scheduler, every, options):
    own = pipe.with_scheduler(scheduler)
    kind = "StableDiffusionImg2ImgPipeline" if "image" in options else "StableDiffusionPipeline"
    expected = reference(kind, own, every, **options)
    assert decibels(own, expected, output_reuse=every, **options) >= 50
    assert decibels(own, expected, **options) < 50  # it does something


def test_the_second_full_evaluation_comes_early():
    def said(starts, every, extrapolates):
        sources = list_sources(starts, every, extrapolates=extrapolates)
        return "".join("f" if last == k else "." for k, (last, _) in enumerate(sources))

    plain = [True] + [False] * 11
    assert said(plain, 5, True) == "f..f....f..."
    assert said(plain, 2, True) == "ff.f.f.f.f.f"
    assert said(plain, 5, False) == "f....f....f."
    assert said([k in (0, 6) for k in range(12)], 4, True) == "f.f...f.f..."


def test_steps_are_the_evaluations_that_are_computed(pipe):
    table = sampler_table({"_class_name": "DDIMScheduler"}, 10)
    reduced, computed = with_output_reuse(table, 4)
    assert computed == [0, 2, 6]
    assert np.array_equal(reduced.timesteps, table.timesteps[computed])
    steps = []
    own = pipe.with_scheduler("DDIM")
    options = {"num_inference_steps": 10, "output_reuse": 4}
    own(PROMPT, **options, on_step=lambda step: steps.append((step.index, step.total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    steps.clear()
    options |= {"hires_scale": 1.5, "hires_strength": 0.999}
    own(PROMPT, **options, on_step=lambda step: steps.append((step.index, step.total)))
    assert steps == [(k, 6) for k in range(1, 7)]


@pytest.mark.parametrize("spacing", ["Karras", "Beta", "Exponential"])
def test_weights_are_bounded(pipe, spacing):
    own = pipe.with_scheduler(f"DPM++ 2M {spacing}")
    arguments = {"num_inference_steps": 20, "seed": 0, "output_type": "np"}
    expected = own(PROMPT, **arguments).images[0]
    actual = own(PROMPT, **arguments, output_reuse=2).images[0]
    assert np.square(actual - expected).mean() < 4e-3  # 24 dB
    close = {**arguments, "sigmas": [14.6, 14.6 - 1e-7, 5.0, 1.0, 0.2, 0.0]}
    latents = pipe.with_scheduler("Euler")(
        PROMPT, **{**close, "output_type": "latent"}, output_reuse=2
    ).images
    assert np.abs(latents).max() < 50


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("image", [False, True])
def test_recurrence_and_matrix_are_the_same_run(kind, image):
    table = sampler_table({"_class_name": kind}, 14, image=image, edits=True)
    reduced, _ = with_output_reuse(table, 3)
    count = reduced.evaluations
    assert count < table.evaluations and reduced.starts_from_image == image
    start, rest = np.split(np.random.default_rng(0).normal(size=(2 + 2 * count)), [1])
    outputs, latents, edits = np.split(rest, [count, len(rest) - count])
    latents = latents[:image]
    states = np.zeros(count)
    for k in range(count + 1):
        value = reduced.recurrence[k] @ np.concatenate([start, outputs, latents, states])
        if k:
            value = states[k - 1] = value + edits[k - 1] / reduced.scales[k]
        expected = reduced.matrix[k] @ np.concatenate([start, outputs, latents, edits])
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_callbacks_and_masks_edit_what_is_read(pipe):
    own = pipe.with_scheduler("DPM++ 2M")
    options = {"num_inference_steps": 9, "seed": 0, "output_type": "np", "output_reuse": 3}

    def add(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] + (0.5 if index == 1 else 0.0)}

    every = {**options, "output_reuse": 1}
    plain = own(PROMPT, **options).images[0]
    assert np.abs(own(PROMPT, **options, callback_on_step_end=add).images[0] - plain).mean() > 0.01
    masked = {"image": GRADIENT, "mask_image": MASK}
    inpainted, full = (own(PROMPT, **more, **masked).images[0] for more in (options, every))
    outside = np.asarray(MASK) == 0
    near, far = (np.abs(image - full)[outside].mean() for image in (inpainted, plain))
    assert near < 0.2 * far


@pytest.mark.parametrize("deterministic", [False, True])
def test_in_flight_images_have_their_bytes(pipe, deterministic):
    own = pipe.with_scheduler("Euler")
    jobs = [
        {"output_reuse": every, "num_inference_steps": 6 + every, "seed": every}
        for every in (1, 2, 3, 5)
    ]
    with InflightBatcher(own, rows=16, deterministic=deterministic) as engine:
        handles = [engine.submit(PROMPT, job)[0] for job in jobs]
        items = [handle.future.result(60) for handle in handles]
    for job, item in zip(jobs, items, strict=True):
        alone = own(PROMPT, **job)
        assert item.image.tobytes() == alone.images[0].tobytes(), job
        assert item.parameters == alone.parameters[0]
    assert "Output reuse: 5" in items[-1].parameters


def test_a_reuse_of_one_is_the_ordinary_run(pipe):
    own = pipe.with_scheduler("Euler")
    plain, same = (
        own(PROMPT, num_inference_steps=4, seed=1, **more).images[0].tobytes()
        for more in ({}, {"output_reuse": 1})
    )
    assert plain == same


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        ("Euler a", {}, "which adds noise"),
        ("LCM", {}, "which adds noise"),
        ("Euler", {"prompt": "a [red:blue:0.5] circle"}, "a prompt that changes"),
        ("Euler", {"prompt": "a [red:blue:1.5] circle", "hires_scale": 1.5}, "that changes"),
        ("Euler", {"hires_prompt": "a [red|blue] circle", "hires_scale": 1.5}, "that changes"),
        ("Euler", {"guidance_interval": (0.2, 0.8)}, "guidance on a part"),
        ("Euler", {"output_reuse": 12}, "leaves one evaluation of 6"),
        ("Euler", {"feature_reuse": 2}, "both feature_reuse and output_reuse"),
        ("Euler", {"output_reuse": 0}, "output_reuse"),
        ("Euler", {"output_reuse": 1.5}, "output_reuse"),
    ],
)
def test_it_is_refused_where_it_cannot_be(pipe, scheduler, options, message):
    options = {"output_reuse": 3, "prompt": PROMPT, "num_inference_steps": 6, **options}
    with pytest.raises(UsageError, match=message):
        pipe.with_scheduler(scheduler)(**options)


def test_it_is_refused_with_clipped_samples(pipe):
    own = pipe.with_scheduler({"_class_name": "DDIMScheduler", "clip_sample": True})
    with pytest.raises(UsageError, match="clips samples"):
        own(PROMPT, num_inference_steps=4, output_reuse=2)


def test_control_is_allowed_on_the_whole_run_only():
    with sdrt.load("shapes", backend="onnxruntime", controlnet="outline") as loaded:
        own = loaded.with_scheduler("DPM++ 2M")
        options = {"num_inference_steps": 6, "output_reuse": 2, "control_image": GRADIENT}
        assert own(PROMPT, seed=0, **options).images[0].size == (64, 64)
        with pytest.raises(UsageError, match="control on a part of the run"):
            own(PROMPT, **options, control_guidance_end=0.5)
