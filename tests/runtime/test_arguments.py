"""Arguments as callers pass them: each works, or is refused in words."""

import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.errors import SdrtError, UsageError
from sdrt.runtime import GenerationOptions
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.images import image_to_array
from sdrt.runtime.options import PARSERS

PROMPT = "a red circle on a blue background"
STEPS = {"num_inference_steps": 1, "seed": 0}


@pytest.fixture(scope="module")
def noisy():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))


def pixels(pipe, prompt=PROMPT, **options):
    return np.asarray(pipe(prompt, **{**STEPS, **options}).images[0], int)


def same(pipe, one, other):
    return np.array_equal(pixels(pipe, **one), pixels(pipe, **other))


def test_every_option_has_a_parser():
    assert list(PARSERS) == [field.name for field in fields(GenerationOptions)]


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        ("negative_prompt", None, ""),
        ("negative_prompt", np.str_("red"), "red"),
        ("negative_prompt", ["red"], ("red",)),
        ("negative_prompt", np.array(["red", "blue"]), ("red", "blue")),
        ("seed", np.int64(3), 3),
        ("seed", 3.0, 3),
        ("seed", np.float32(3), 3),
        ("seed", np.array(3), 3),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("seed", [np.int64(3), 4.0], (3, 4)),
        ("seed", range(2), (0, 1)),
        ("seed", np.arange(2), (0, 1)),
        ("num_inference_steps", 20.0, 20),
        ("num_inference_steps", np.int8(4), 4),
        ("num_images_per_prompt", np.uint8(2), 2),
        ("clip_skip", 1.0, 1),
        ("clip_skip", None, 0),
        ("guidance_scale", np.float32(7.5), 7.5),
        ("guidance_scale", np.float16(1.0), 1.0),
        ("guidance_scale", 0, 0.0),
        ("guidance_rescale", None, 0.0),
        ("guidance_interval", [0, np.float64(0.5)], (0.0, 0.5)),
        ("size", (512, 256), "512x256"),
        ("size", [np.int64(512), 256.0], "512x256"),
        ("size", np.array([64, 64]), "64x64"),
        ("size", " 64X64 ", "64x64"),
        ("original_size", np.array([64, 32]), (64, 32)),
        ("timesteps", np.array([900, 100]), (900.0, 100.0)),
        ("sigmas", (14.6, 0), (14.6, 0.0)),
        ("weighting", np.False_, False),
        ("rng", np.str_("cuda"), "cuda"),
    ],
)
def test_values_of_other_types_are_converted(name, value, parsed):
    actual = getattr(parse_options({name: value}), name)
    assert actual == parsed and type(actual) is type(parsed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", True),
        ("seed", -1),
        ("seed", 3.5),
        ("seed", "3"),
        ("seed", []),
        ("seed", [True]),
        ("seed", 2**64),
        ("num_inference_steps", np.True_),
        ("num_inference_steps", 0),
        ("num_inference_steps", np.nan),
        ("num_inference_steps", 2**70),
        ("guidance_scale", False),
        ("guidance_scale", -0.1),
        ("guidance_scale", np.inf),
        ("guidance_scale", np.float64("nan")),
        ("guidance_scale", "7.5"),
        ("guidance_interval", 0.5),
        ("guidance_interval", (0.5,)),
        ("size", 512),
        ("size", (512,)),
        ("size", (512, 512, 3)),
        ("size", (500, 512)),
        ("size", b"64x64"),
        ("negative_prompt", 5),
        ("negative_prompt", ["a", None]),
        ("negative_prompt", b"red"),
        ("weighting", 1),
        ("original_size", 64),
        ("original_size", (64, -1)),
        ("timesteps", []),
        ("timesteps", 5),
        ("timesteps", [1, "x"]),
        ("latents", 5),
        ("latents", [[1, 2], [3]]),
        ("prompt_embeds", "x"),
        ("image", 5),
        ("image", b"a.png"),
        ("image", []),
        ("depth_map", {}),
        ("callback_on_step_end", 5),
        ("rng", None.__class__),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=f"^{name}|size ") as caught:
        parse_options({name: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("steps", "num_inference_steps"),
        ("cfg", "guidance_scale"),
        ("cfg_scale", "guidance_scale"),
        ("resolution", "size"),
        ("mask", "mask_image"),
        ("num_images", "num_images_per_prompt"),
        ("output_type", "PIL images"),
        ("cross_attention_kwargs", "set_lora"),
        ("scheduler", "with_scheduler"),
        ("guidence_scale", "guidance_scale"),
        ("num_inference_step", "num_inference_steps"),
    ],
)
def test_names_of_other_tools_get_the_right_hint(name, hint):
    with pytest.raises(UsageError, match=f"unknown option {name!r}") as caught:
        parse_options({name: 1})
    assert hint in caught.value.hint


def test_names_of_hints_are_no_options():
    from sdrt.runtime.arguments import ALIASES, INSTEAD

    assert not {*ALIASES, *INSTEAD} & {*PARSERS} and {*ALIASES.values()} <= {*PARSERS}


def test_guidance_from_0_to_1_is_no_guidance(pipe):
    for scale in (0, 0.0, 0.5, np.float32(1.0)):
        assert same(pipe, {"guidance_scale": scale}, {"guidance_scale": 1.0})
    assert not same(pipe, {"guidance_scale": 2.0}, {"guidance_scale": 1.0})


def test_each_prompt_has_its_negative_prompt(pipe):
    prompts, negatives = [PROMPT, "a white square"], ["green", "a white cross"]
    together = pipe(prompts, negative_prompt=negatives, num_inference_steps=4, seed=[3, 4])
    for prompt, negative, seed, image, text in zip(
        prompts, negatives, (3, 4), together.images, together.parameters, strict=True
    ):
        alone = pixels(pipe, prompt, negative_prompt=negative, num_inference_steps=4, seed=seed)
        assert np.abs(np.asarray(image, int) - alone).max() <= 1
        assert f"\nNegative prompt: {negative}\n" in text
    twice = pipe(PROMPT, negative_prompt=["red"], num_images_per_prompt=2, **STEPS)
    assert all("Negative prompt: red" in text for text in twice.parameters)
    with pytest.raises(UsageError, match="negative_prompt is a list of 3 for 2 prompts"):
        pipe(prompts, negative_prompt=["a", "b", "c"])


@pytest.mark.parametrize("prompt", [(PROMPT,), np.array([PROMPT]), np.str_(PROMPT)])
def test_prompts_of_other_types(pipe, prompt):
    assert np.array_equal(pixels(pipe, prompt), pixels(pipe))


def test_images_of_every_kind_are_the_same_image(noisy, tmp_path):
    torch = pytest.importorskip("torch")
    noisy.save(tmp_path / "a.png")
    array = np.asarray(noisy)
    tensor = torch.from_numpy(array.transpose(2, 0, 1) / 255.0)
    for inputs in (
        noisy,
        [noisy],
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        array,
        array[None],
        array.astype(np.int64),
        array.astype(np.uint16) * 257,
        array.transpose(2, 0, 1),
        array / 255.0,
        (array / 255.0).astype(np.float32)[None],
        tensor,
        tensor[None].float().requires_grad_(),
    ):
        taken = parse_options({"image": inputs}).image
        assert np.array_equal(image_to_array(taken, (64, 64)), image_to_array(noisy, (64, 64)))
    rough = parse_options({"image": tensor.bfloat16()}).image
    assert np.abs(np.asarray(rough, int) - array).max() <= 1


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I"]
)
def test_images_of_every_mode_are_accepted(pipe, noisy, mode):
    try:
        inputs = noisy.convert(mode)
    except ValueError:
        inputs = Image.new(mode, noisy.size)
    assert pixels(pipe, image=inputs, num_inference_steps=2).shape == (64, 64, 3)
    grey = {"image": noisy, "mask_image": inputs, "num_inference_steps": 2}
    assert pixels(pipe, **grey).shape == (64, 64, 3)


def test_masks_of_every_kind_are_the_same_mask(pipe, noisy):
    light = np.zeros((64, 64), bool)
    light[8:40, 8:40] = True
    expected = pixels(pipe, image=noisy, mask_image=Image.fromarray(light), num_inference_steps=2)
    for mask in (light, light.astype(np.float32), light[:, :, None] * np.uint8(255), light[None]):
        actual = pixels(pipe, image=noisy, mask_image=mask, num_inference_steps=2)
        assert np.array_equal(actual, expected)
    ones = light.astype(np.uint8)  # nothing but 0 and 1
    deep = Image.fromarray(light.astype(np.int32) * 255)  # 255 of 65535
    for mask in (ones, ones.astype(np.int64), Image.fromarray(ones), deep):
        actual = pixels(pipe, image=noisy, mask_image=mask, num_inference_steps=2)
        assert np.array_equal(actual, expected)


def test_the_alpha_of_a_mask_is_not_passed_over(pipe, noisy):
    light = np.zeros((64, 64), np.uint8)
    light[8:40, 8:40] = 255
    shape = Image.fromarray(light)
    expected = pixels(pipe, image=noisy, mask_image=shape, num_inference_steps=2)
    painted = Image.merge("RGBA", [Image.new("L", (64, 64), 255)] * 3 + [shape])
    actual = pixels(pipe, image=noisy, mask_image=painted, num_inference_steps=2)
    assert np.array_equal(actual, expected)
    hole = noisy.convert("RGBA")  # as OpenAI's masks are: transparent where the image is made new
    hole.putalpha(Image.fromarray(255 - light))
    black = Image.merge("RGBA", [Image.new("L", (64, 64))] * 3 + [shape])
    for mask in (hole, black):
        with pytest.raises(UsageError, match="alpha"):
            pipe(PROMPT, image=noisy, mask_image=mask, num_inference_steps=2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((64, 64, 3), 1.5), "1.5 .* floats from 0"),
        (np.full((64, 64, 3), -1.0, np.float32), "-1 .* floats from 0"),
        (np.full((64, 64, 3), 256), "integers from 0 .* 255"),
        (np.full((64, 64, 3), np.nan), "NaN"),
        (np.zeros((64, 64, 2)), "one image"),
        (np.zeros((2, 64, 64, 3)), "one image"),
        (np.zeros(64), "one image"),
        (np.zeros((0, 64, 3)), "one image"),
        (np.zeros((64, 64, 3), complex), "an array"),
        (np.zeros((64, 64, 3), object), "an array"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array, message):
    with pytest.raises(UsageError, match=f"^image .*{message}"):
        parse_options({"image": array})


def test_several_images_are_refused_in_words(noisy):
    with pytest.raises(UsageError, match="make a call for each"):
        parse_options({"image": [noisy, noisy]})


def test_at_strength_0_the_image_comes_back(pipe, noisy):
    inputs = {"image": noisy, "strength": 0.0}
    assert np.array_equal(pixels(pipe, **inputs), np.asarray(noisy))
    assert np.array_equal(pixels(pipe, **inputs, mask_image=noisy), np.asarray(noisy))
    assert pipe(PROMPT, **STEPS, **inputs, size=(96, 64)).images[0].size == (96, 64)
    assert list(pipe.steps(PROMPT, **STEPS, **inputs)) == []
    with InflightBatcher(pipe) as engine:
        (handle,) = engine.submit(PROMPT, {**STEPS, **inputs})
        output = handle.future.result(timeout=60)
    assert np.array_equal(np.asarray(output.image), np.asarray(noisy))
    assert "Denoising strength: 0," in output.parameters
    assert not np.array_equal(pixels(pipe, image=noisy, strength=1), np.asarray(noisy))


@pytest.mark.parametrize("name", ["strength", "mask_image"])
def test_what_would_be_ignored_without_an_image_is_refused(name, noisy):
    with pytest.raises(UsageError, match=f"^{name} requires image"):
        parse_options({name: 0.5 if name == "strength" else noisy})


@pytest.mark.parametrize("returned", [None, {}, {"latents": None}])
def test_a_callback_may_return_nothing(pipe, returned):
    assert same(pipe, {"callback_on_step_end": lambda *_: returned}, {})


@pytest.mark.parametrize("returned", [5, np.zeros((1, 4, 8, 8)), {"latents": "x"}])
def test_what_a_callback_may_not_return_is_refused(pipe, returned):
    with pytest.raises(UsageError, match="callback_on_step_end"):
        pipe(PROMPT, **STEPS, callback_on_step_end=lambda *_: returned)


def test_the_schedule_may_be_an_array(pipe):
    torch = pytest.importorskip("torch")
    own = pipe.with_scheduler("Euler")
    timesteps = [900, 500, 100]
    for inputs in (np.array(timesteps), tuple(timesteps), torch.tensor(timesteps)):
        assert same(own, {"timesteps": inputs}, {"timesteps": timesteps})


class Strange:
    """An object whose every conversion fails."""

    shape, ndim, dtype = "x", 0, None

    def __repr__(self):
        raise RuntimeError("no name")

    def __array__(self, *_, **__):
        raise RuntimeError("no array")

    def __len__(self):
        raise RuntimeError("no length")

    def item(self):
        raise RuntimeError("no number")


ODD = [
    *(None, True, 0, 1, -1, 1.0, 0.5, 2**70, 10**5000, 1e308, np.nan, np.inf, -np.inf, 1j),
    *("", "x", "64x64", "\0", "a" * 5000, b"x", b"", [], (), {}, set(), [[]], [None], ["x"], [1]),
    *([1, 2], (64, 64), {"a": 1}, range(2), range(0), object, object(), Strange(), [Strange()]),
    *(np.int64(1), np.float32(0.5), np.bool_(True), np.str_("x"), np.datetime64("now")),
    *(np.zeros(0), np.zeros(2), np.zeros((64, 64)), np.zeros((64, 64, 3), np.uint8)),
    *(np.zeros((1, 4, 8, 8), np.float32), np.zeros((1, 32, 128)), np.array(None), np.array("x")),
    *(np.zeros((2, 2, 2, 2, 2)), np.full((64, 64), np.nan), np.array([1, "x"], object)),
    *(Image.new("L", (64, 64)), Image.new("F", (64, 64), 9.0), Image.new("RGB", (0, 5))),
    *(Path("nowhere"), Path(), lambda *_: None, len, Exception("x"), iter([1])),
]
RELATED = ("image", "mask_image", "depth_map", "strength")


def works_or_is_refused(call, *arguments, **options):
    """Whether it works; anything else than an SdrtError in words is a failure of the test."""
    try:
        call(*arguments, **options)
    except SdrtError as error:
        assert str(error)
        return False
    return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_odd_values_work_or_are_refused(pipe):
    """Every option with every odd value, and some with others next to them."""
    chooser, worked = random.Random(0), 0
    image = Image.new("RGB", (64, 64), "red")
    for name in PARSERS:
        for value in ODD:
            options = {**STEPS, name: value}
            if name in RELATED:
                options = {"image": image, **options}
            other = chooser.choice(list(PARSERS))
            worked += works_or_is_refused(parse_options, options)
            works_or_is_refused(parse_options, {**options, other: chooser.choice(ODD)})
            if chooser.random() < 0.1:
                few = {**options, "num_images_per_prompt": 1}
                works_or_is_refused(lambda: list(pipe.steps(PROMPT, **few)))  # noqa: B023
                works_or_is_refused(pipe, PROMPT, **few)
    assert worked > 100


@pytest.mark.parametrize("name", ["prompt", "on_step"])
def test_odd_values_of_a_call_work_or_are_refused(pipe, name):
    for value in ODD:
        if name == "on_step" and callable(value):
            continue
        inputs = {"prompt": PROMPT, "on_step": None, name: value}
        works_or_is_refused(pipe, inputs.pop("prompt"), **STEPS, **inputs)


def test_odd_values_of_the_other_functions_work_or_are_refused(pipe, tmp_path):
    for value in ODD:
        works_or_is_refused(pipe.with_scheduler, value)
        works_or_is_refused(pipe.with_scheduler, {**pipe.scheduler_config, "beta_start": value})
        assert not works_or_is_refused(pipe.set_lora, {"nothing": value})
        works_or_is_refused(pipe.set_lora, value)
        for name in ("device", "stream", "low_memory", "compile", "precision"):
            inputs = {"backend": "none", name: value}
            assert not works_or_is_refused(sdrt.load, tmp_path, **inputs)
        assert not works_or_is_refused(sdrt.load, tmp_path, backend=value)
    for device in ("gpu", "cuda:", "cuda:x", "cpu:0", -1, 1.5):
        with pytest.raises(UsageError, match=r"device is .*number of a GPU"):
            sdrt.load(device=device)
    with pytest.raises(UsageError, match=r"bundle is 5.*name or folder"):
        sdrt.load(5)
    with pytest.raises(UsageError, match=r"loras is .*mapping"):
        pipe.set_lora(["x"])


def test_odd_values_of_a_submission_work_or_are_refused(pipe):
    with InflightBatcher(pipe) as engine:
        for value in ODD:
            for name in ("prompt", "options", "scheduler", "priority", "deadline", "on_step"):
                inputs = {"prompt": PROMPT, "options": STEPS, name: value}
                works_or_is_refused(engine.submit, **inputs)
            works_or_is_refused(engine.submit, PROMPT, {**STEPS, "strength": value})
            for name in ("slots", "waiting", "rows"):
                works_or_is_refused(InflightBatcher, pipe, **{name: value})
        for handle in engine.unfinished():
            handle.cancel()
