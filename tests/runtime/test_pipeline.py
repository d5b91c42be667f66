"""Prompts, seeds, batches and files, on the embedded model."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.errors import SdrtError, UsageError
from sdrt.runtime.denoising import Guidance, get_history_layout
from sdrt.runtime.images import make_grid, save_image
from sdrt.runtime.samplers.table import sampler_table

PROMPT = "a red circle on a blue background"


def pixels(image):
    return np.asarray(image)


def test_the_same_seed_is_the_same_image(pipe):
    first, second = (pipe(PROMPT, num_inference_steps=5, seed=0).images[0] for _ in range(2))
    other = pipe(PROMPT, num_inference_steps=5, seed=1).images[0]
    assert (pixels(first) == pixels(second)).all()
    assert (pixels(first) != pixels(other)).any()


def test_seed_zero_is_a_seed_and_none_is_random(pipe):
    assert pipe(PROMPT, num_inference_steps=1, seed=0).seeds == [0]
    generated = {pipe(PROMPT, num_inference_steps=1).seeds[0] for _ in range(3)}
    assert len(generated) == 3


def test_a_guidance_before_leaves_no_trace(pipe):
    def draw(scale):
        options = {"num_inference_steps": 5, "seed": 0, "guidance_scale": scale}
        return pixels(pipe(PROMPT, **options).images[0])

    strong, weak, none = (draw(scale) for scale in (7.5, 3.0, 1.0))
    assert (strong != weak).any() and (weak != none).any()
    for scale, before in ((1.0, none), (3.0, weak), (7.5, strong)):
        assert (draw(scale) == before).all()


def test_a_plan_lives_as_long_as_its_table():
    table = replace(sampler_table({"_class_name": "DDIMScheduler"}, 5))
    halves, guided = (Guidance(np.full(5, scale)) for scale in (0.5, 7.5))
    plan = get_history_layout(table, guided)
    assert get_history_layout(table, Guidance(guided.scales.copy())) is plan
    assert (get_history_layout(table, halves).rows != plan.rows).any()
    cached = weakref.ref(table)
    del table
    assert cached() is None


def test_a_batch_is_its_images_one_by_one(pipe):
    prompts = [PROMPT, "a yellow square on a black background", ""]
    together = pipe(prompts, num_inference_steps=4, seed=[5, 9, 7], num_images_per_prompt=1)
    for prompt, seed, image in zip(prompts, (5, 9, 7), together.images, strict=True):
        alone = pipe(prompt, num_inference_steps=4, seed=seed).images[0]
        difference = np.abs(pixels(alone).astype(int) - pixels(image).astype(int))
        assert difference.max() <= 1


def test_more_images_than_fit_are_generated_in_batches(pipe):
    out = pipe(PROMPT, num_inference_steps=1, seed=3, num_images_per_prompt=6)
    assert len(out.images) == 6 and out.seeds == [3, 4, 5, 6, 7, 8]


def test_steps_yield_the_latents_of_the_call(pipe):
    steps = list(pipe.steps(PROMPT, num_inference_steps=4, seed=0))
    assert [s.index for s in steps] == [1, 2, 3, 4, 5] and steps[0].total == 5
    decoded = pipe.decode(steps[-1].latents)[0]
    assert (pixels(decoded) == pixels(pipe(PROMPT, num_inference_steps=4, seed=0).images[0])).all()


def test_with_scheduler_shares_the_engines(pipe):
    other = pipe.with_scheduler("EulerDiscreteScheduler")
    assert other.engines is pipe.engines
    a, b = (p(PROMPT, num_inference_steps=8, seed=0).images[0] for p in (pipe, other))
    assert (pixels(a) != pixels(b)).any()
    with pytest.raises(UsageError, match="did you mean Euler"):
        pipe.with_scheduler("Eulr")


@pytest.mark.parametrize(
    "bad",
    [
        {"num_inference_steps": 0},
        {"num_inference_steps": -3},
        {"num_inference_steps": 100_000},
        {"guidance_scale": -1.0},
        {"guidance_scale": math.nan},
        {"guidance_scale": math.inf},
        {"guidance_scale": 1e9},
        {"num_images_per_prompt": 0},
        {"num_images_per_prompt": -1},
        {"num_images_per_prompt": 10**9},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": [1, 2]},
        {"size": "63x64"},
        {"size": "72x64"},
    ],
)
def test_bad_values_are_refused(pipe, bad):
    with pytest.raises(UsageError):
        pipe(PROMPT, **bad)


def test_latents_with_nan_make_no_image(pipe):
    latents = np.full((1, 4, 8, 8), np.nan, np.float32)
    with pytest.raises(SdrtError, match="NaN"):
        pipe.decode(latents)


def test_a_closed_pipeline_says_so(shapes):
    pipe = sdrt.load(shapes)
    pipe.close()
    with pytest.raises(sdrt.BackendError, match="closed"):
        pipe(PROMPT, num_inference_steps=1)


def test_png_carries_the_parameters(pipe, tmp_path):
    out = pipe("ein Kreis, größer", negative_prompt="green", num_inference_steps=2, seed=0)
    save_image(out.images[0], tmp_path / "new" / "a.png", out.parameters[0])
    text = Image.open(tmp_path / "new" / "a.png").text["parameters"]
    lines = text.split("\n")
    assert lines[:2] == ["ein Kreis, größer", "Negative prompt: green"]
    assert lines[2].startswith("Steps: 2, Sampler: PLMS, CFG scale: 7.5, Seed: 0, Size: 64x64, ")
    assert "RNG: CPU" in lines[2]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_grid_holds_every_image():
    colours = [(i * 20, 0, 0) for i in range(5)]
    grid = make_grid([Image.new("RGB", (8, 4), colour) for colour in colours])
    assert grid.size == (24, 8)
    actual = [grid.getpixel((i % 3 * 8 + 1, i // 3 * 4 + 1)) for i in range(5)]
    assert actual == colours
