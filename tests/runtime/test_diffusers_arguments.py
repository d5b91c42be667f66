"""Arguments under diffusers' names: what they mean there, they mean here, or they are refused."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sdrt
from sdrt.errors import UsageError
from sdrt.runtime.arguments import DIFFUSERS, GenerationKwargs, parse_options
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.options import PARSERS

PROMPT = "a red circle on a blue background"
STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(shapes):
    with sdrt.load(shapes, backend="onnxruntime", device="cpu") as loaded:
        yield loaded


def pixels(image):
    return np.asarray(image)


def test_typed_arguments_are_those_that_are_accepted():
    assert {*GenerationKwargs.__annotations__} == {*PARSERS, *DIFFUSERS, "preset"}


def test_a_torch_generator_is_its_seed(pipe):
    expected = pipe(PROMPT, seed=5, **STEPS)
    generator = torch.Generator().manual_seed(5)
    output = pipe(PROMPT, generator=generator, **STEPS)
    assert output.seeds == [5]
    assert np.array_equal(pixels(output.images[0]), pixels(expected.images[0]))
    one_each = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
    both = pipe([PROMPT] * 2, generator=one_each, **STEPS)
    assert both.seeds == [5, 9]


def test_a_generator_that_was_used_is_refused(pipe):
    generator = torch.Generator().manual_seed(5)
    torch.randn(3, generator=generator)
    with pytest.raises(UsageError) as caught:
        pipe(PROMPT, generator=generator, **STEPS)
    assert "manual_seed" in caught.value.hint
    generator.manual_seed(5)
    pipe(PROMPT, generator=generator, **STEPS)
    with pytest.raises(UsageError):  # the second call would have other noise in diffusers
        pipe(PROMPT, generator=generator, **STEPS)


def test_one_torch_generator_for_several_images_is_refused(pipe):
    with pytest.raises(UsageError, match="seed is a list of 1 for 2 images"):
        pipe(PROMPT, generator=torch.Generator().manual_seed(5), num_images_per_prompt=2, **STEPS)


def test_other_generators():
    sampled = int(np.random.default_rng(3).integers(2**32))
    assert parse_options({"generator": np.random.default_rng(3)}).seed == sampled
    assert parse_options({"generator": 7}).seed == 7
    for generator in ("x", True, [], object(), [torch.Generator(), "x"]):
        with pytest.raises(UsageError, match=r"^generator is"):
            parse_options({"generator": generator})
    with pytest.raises(UsageError, match="both seed and generator"):
        parse_options({"generator": 7, "seed": 7})
    with pytest.raises(UsageError, match="rng is cuda"):
        parse_options({"generator": torch.Generator(), "rng": "cuda"})


def test_height_and_width(pipe):
    assert pipe(PROMPT, height=64, width=96, **STEPS).images[0].size == (96, 64)
    for arguments in ({"height": 64}, {"width": 64}, {"height": 64, "width": 64, "size": (64, 64)}):
        with pytest.raises(UsageError, match=r"height|width"):
            parse_options(arguments)
    assert parse_options({"height": None, "width": None}).size is None


def test_arrays_are_the_images_before_rounding(pipe):
    expected = pipe(PROMPT, seed=[1, 2], num_images_per_prompt=2, **STEPS)
    arrays = pipe(PROMPT, seed=[1, 2], num_images_per_prompt=2, output_type="np", **STEPS)
    assert arrays.images.shape == (2, 64, 64, 3) and arrays.images.dtype == np.float32
    rounded = np.rint(arrays.images * 255).astype(np.uint8)
    assert np.array_equal(rounded, np.stack([pixels(image) for image in expected.images]))
    assert (arrays.images * 255 != rounded).any()
    assert arrays.seeds == [1, 2] and arrays.parameters == expected.parameters


def test_latents_decode_to_the_images(pipe):
    latents = pipe(PROMPT, seed=1, output_type="latent", **STEPS).images
    assert latents.shape == (1, 4, 8, 8) and latents.dtype == np.float32
    expected = pipe(PROMPT, seed=1, **STEPS).images[0]
    assert np.array_equal(pixels(pipe.decode(latents)[0]), pixels(expected))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    same = pipe(PROMPT, latents=noise, output_type="latent", **STEPS).images
    assert np.allclose(same, latents, atol=1e-3)


def test_an_image_at_strength_0_as_an_array(pipe):
    noisy = Image.effect_noise((64, 64), 90).convert("RGB")
    output = pipe(PROMPT, image=noisy, strength=0.0, output_type="np", **STEPS)
    assert np.array_equal(np.rint(output.images[0] * 255), pixels(noisy))
    with pytest.raises(UsageError, match="latent at strength 0"):
        pipe(PROMPT, image=noisy, strength=0.0, output_type="latent", **STEPS)


def test_return_dict_false_is_a_tuple(pipe):
    images, flagged = pipe(PROMPT, seed=1, return_dict=False, **STEPS)
    assert np.array_equal(pixels(images[0]), pixels(pipe(PROMPT, seed=1, **STEPS).images[0]))
    assert flagged is None  # this bundle has no safety checker


@pytest.mark.parametrize("name", ["output_type", "return_dict", "progress"])
def test_what_a_call_alone_accepts_is_refused_elsewhere(pipe, name):
    with pytest.raises(UsageError, match=f"unknown option '{name}'"):
        pipe.steps(PROMPT, **{name: True})
    with pytest.raises(UsageError, match=f"^{name} is"):
        pipe(PROMPT, **{name: "pt"})


def test_eta_is_the_schedulers(pipe):
    ddim = pipe.with_scheduler("DDIMScheduler")
    by_config = ddim.with_scheduler({**ddim.scheduler_config, "eta": 0.5})
    expected = by_config(PROMPT, seed=1, num_inference_steps=3)
    output = ddim(PROMPT, seed=1, num_inference_steps=3, eta=0.5)
    assert np.array_equal(pixels(output.images[0]), pixels(expected.images[0]))
    assert output.parameters == expected.parameters
    euler = pipe.with_scheduler("EulerDiscreteScheduler")
    assert euler(PROMPT, eta=0.0, **STEPS).images
    with pytest.raises(UsageError, match="eta is unsupported by EulerDiscreteScheduler"):
        euler(PROMPT, eta=0.5, **STEPS)


def test_callbacks_get_the_latents_alone(pipe):
    seen = []

    def callback(_pipe, index, _timestep, tensors):
        seen.append((index, {*tensors}))
        return tensors

    inputs = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}
    pipe(PROMPT, **inputs, **STEPS)
    assert seen and all(names == {"latents"} for _, names in seen)
    with pytest.raises(UsageError, match="callback_on_step_end_tensor_inputs"):
        parse_options({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]})


def test_guidance_scales_from_0_to_1_are_no_guidance(pipe):
    images = [
        pipe(PROMPT, seed=1, guidance_scale=scale, negative_prompt=None, **STEPS).images[0]
        for scale in (0.0, 1.0)
    ]
    assert np.array_equal(pixels(images[0]), pixels(images[1]))


def test_a_submission_accepts_arguments_by_name(pipe):
    expected = pipe(PROMPT, seed=3, **STEPS).images[0]
    with InflightBatcher(pipe) as batcher:
        (handle,) = batcher.submit(PROMPT, num_inference_steps=2, seed=3)
        image = handle.future.result(timeout=60).image
        with pytest.raises(UsageError, match="seed is passed twice"):
            batcher.submit(PROMPT, {"seed": 3}, seed=3)
        with pytest.raises(UsageError, match="unknown option 'steps'"):
            batcher.submit(PROMPT, steps=3)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_progress_is_shown_when_asked_for(pipe, capsys):
    seen = []
    pipe(PROMPT, progress=True, on_step=seen.append, **STEPS)
    assert "evaluations" in capsys.readouterr().err and len(seen) == seen[0].total
    pipe(PROMPT, **STEPS)
    assert "evaluations" not in capsys.readouterr().err


def test_a_notebook_shows_the_images(pipe):
    output = pipe(PROMPT, num_images_per_prompt=2, seed=1, **STEPS)
    assert output._repr_png_().startswith(b"\x89PNG")
    assert sdrt.Output([], [], [])._repr_png_() is None


def test_repr_is_one_line(pipe):
    assert repr(pipe) == "Pipeline(shapes, onnxruntime/cpu, fp32, 64x64)"


def test_torch_is_not_imported_for_a_generator():
    import subprocess

    code = (
        "import sys; from sdrt.runtime.arguments import parse_options;"
        "parse_options({'generator': 3, 'latents': [[1.0]]}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
