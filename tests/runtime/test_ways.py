"""Images, masks, latents, embeddings and callbacks, against diffusers' pipelines."""

import numpy as np
import pytest
from PIL import Image
from shapes_scenes import draw, scene_from_random

from sdrt.errors import UsageError
from sdrt.runtime.text import conditioning

PROMPT = "a red circle on a blue background"
STEPS = 10


@pytest.fixture(scope="module")
def source():
    return Image.fromarray(draw(scene_from_random(np.random.default_rng(3)), 64))


@pytest.fixture(scope="module")
def mask():
    light = np.zeros((64, 64), np.uint8)
    light[8:48, 16:56] = 255
    return Image.fromarray(light)


@pytest.fixture(scope="module")
def reference(embedded):
    """A function that runs one of the reference's pipelines with a scheduler of ours by name."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    base = diffusers.StableDiffusionPipeline.from_pretrained(embedded)
    base.to(dtype=torch.float32)
    if not hasattr(base.text_encoder, "text_model"):  # newer transformers, for its clip_skip
        object.__setattr__(base.text_encoder, "text_model", base.text_encoder)

    def run(kind, own, **arguments):
        pipe = getattr(diffusers, kind)(**base.components)
        pipe.set_progress_bar_config(disable=True)
        config = own.scheduler_config
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        return pipe(
            generator=torch.Generator("cpu").manual_seed(0),
            num_inference_steps=STEPS,
            output_type="np",
            **arguments,
        ).images[0]

    return run


def decibels(own, expected, prompt=PROMPT, **options):
    *_, last = own.steps(prompt, num_inference_steps=STEPS, seed=0, **options)
    actual = np.clip(own.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)
    return 10 * np.log10(1.0 / max(np.mean((actual.astype(np.float64) - expected) ** 2), 1e-12))


SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
SCHEDULERS += ("DPMSolverMultistepScheduler", "HeunDiscreteScheduler")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.mark.sample(5)
@pytest.mark.reference
@pytest.mark.parametrize("strength", [0.35, 0.8, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_is_the_references(pipe, reference, source, name, strength):
    own = pipe.with_scheduler(name)
    options = {"image": source, "strength": strength}
    expected = reference("StableDiffusionImg2ImgPipeline", own, prompt=PROMPT, **options)
    assert decibels(own, expected, **options) >= 50


@pytest.mark.sample(4)
@pytest.mark.reference
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS[:4])
def test_inpainting_is_the_references(pipe, reference, source, mask, name, strength):
    own = pipe.with_scheduler(name)
    options = {"image": source, "mask_image": mask, "strength": strength}
    expected = reference("StableDiffusionInpaintPipeline", own, prompt=PROMPT, **options)
    assert decibels(own, expected, **options) >= 50


def test_inpainting_keeps_what_the_mask_keeps(pipe, source, mask):
    out = pipe(PROMPT, image=source, mask_image=mask, strength=1.0, seed=0).images[0]
    outside = np.ones((64, 64), bool)
    outside[0:56, 8:64] = False  # the decoder sees a little over the edge
    difference = np.abs(np.asarray(out, int) - np.asarray(source, int))
    assert difference[outside].mean() < 8 < difference[8:48, 16:56].mean()


@pytest.mark.reference
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_rescale": 0.7},
        # Unguided: the reference leaves layers out of the prompt's encoding alone.
        {"clip_skip": 1, "guidance_scale": 1.0},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a white cross on a green background"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_are_the_references(pipe, reference, options):
    expected = reference("StableDiffusionPipeline", pipe, prompt=PROMPT, **options)
    assert decibels(pipe, expected, **options) >= 50


@pytest.mark.reference
def test_embeddings_give_the_images_of_diffusers(pipe, reference):
    import torch

    rng = np.random.default_rng(0)
    both = [rng.normal(size=(1, 32, 128)).astype(np.float32) for _ in range(2)]
    names = ("prompt_embeds", "negative_prompt_embeds")
    provided = dict(zip(names, both, strict=True))
    tensors = {name: torch.from_numpy(array) for name, array in provided.items()}
    expected = reference("StableDiffusionPipeline", pipe, **tensors)
    assert decibels(pipe, expected, None, **provided) >= 50


@pytest.mark.reference
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_callback_changes_the_latents_as_in_the_reference(pipe, reference, name):
    seen = []

    def callback(pipeline, index, timestep, provided):
        seen.append((index, float(timestep)))
        return {"latents": provided["latents"] * (0.9 if index == 3 else 1.0)}

    own = pipe.with_scheduler(name)
    expected = reference(
        "StableDiffusionPipeline", own, prompt=PROMPT, callback_on_step_end=callback
    )
    theirs, seen[:] = list(seen), []
    assert decibels(own, expected, callback_on_step_end=callback) >= 50
    assert np.array(seen) == pytest.approx(np.array(theirs), rel=1e-6)


def test_latents_are_the_starting_noise(pipe):
    from sdrt.runtime import randn

    plain = pipe(PROMPT, num_inference_steps=4, seed=3).images[0]
    provided = pipe(PROMPT, num_inference_steps=4, latents=randn(3, (1, 4, 8, 8)), seed=9).images[0]
    assert np.array_equal(np.asarray(plain), np.asarray(provided))


def test_fresh_noise_is_each_images_own(pipe):
    own = pipe.with_scheduler("Euler a")
    together = own([PROMPT, "a square", PROMPT], seed=[4, 5, 6], num_inference_steps=5).images
    alone = own(PROMPT, seed=6, num_inference_steps=5).images[0]
    difference = np.abs(np.asarray(together[2], int) - np.asarray(alone, int))
    assert difference.max() <= 1


class Counted:
    """An engine that notes how many rows it was asked for."""

    def __init__(self, engine):
        self.engine, self.rows = engine, []
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def __call__(self, feeds):
        self.rows.append(len(feeds["sample"]))
        return self.engine(feeds)


def test_a_prompt_is_encoded_once(pipe, monkeypatch):
    from dataclasses import replace

    class Encoder(Counted):
        def __call__(self, feeds):
            self.rows.append(len(feeds["input_ids"]))
            return self.engine(feeds)

    encoder = Encoder(pipe.engines["text_encoder"])
    own = replace(pipe, engines={**pipe.engines, "text_encoder": encoder}, chunk_cache={})
    first = own(PROMPT, num_inference_steps=2, seed=0).images[0]
    again = own.with_scheduler("PLMS")(PROMPT, num_inference_steps=2, seed=0).images[0]
    assert encoder.rows == [2] and np.array_equal(np.asarray(first), np.asarray(again))
    own(PROMPT, num_inference_steps=1, seed=0, clip_skip=1)
    own("a square", num_inference_steps=1, seed=0, negative_prompt="green")
    assert encoder.rows == [2, 2, 2]
    monkeypatch.setattr(conditioning, "MAX_CACHED_CHUNKS", 12)
    for i in range(4):
        own([f"a circle {i * 5 + k}" for k in range(5)], num_inference_steps=1, seed=0)
    assert len(own.chunk_cache) <= 12


def test_outside_the_interval_the_unguided_row_is_not_computed(pipe):
    from dataclasses import replace

    counted = Counted(pipe.engines["unet"])
    own = replace(pipe, engines={**pipe.engines, "unet": counted}).with_scheduler("DDIM")
    own(PROMPT, num_inference_steps=10, seed=0, guidance_interval=(0.2, 0.6))
    assert counted.rows == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]
    complete = pipe(PROMPT, num_inference_steps=4, seed=0).images[0]
    same = pipe(PROMPT, num_inference_steps=4, seed=0, guidance_interval=(0.0, 1.0)).images[0]
    assert np.array_equal(np.asarray(complete), np.asarray(same))


def test_attention_changes_the_image_and_one_does_not(pipe):
    plain, same, more = (
        np.asarray(pipe(text, num_inference_steps=6, seed=0).images[0], int)
        for text in (PROMPT, PROMPT.replace("red", "(red:1.0)"), PROMPT.replace("red", "(red:1.6)"))
    )
    assert np.array_equal(plain, same) and np.abs(plain - more).max() > 3


def test_prompts_of_different_lengths_are_batched_apart(pipe):
    long = PROMPT + " BREAK a white cross on a green background"
    out = pipe([long, PROMPT, long], seed=[1, 2, 3], num_inference_steps=3)
    alone = pipe(PROMPT, seed=2, num_inference_steps=3).images[0]
    assert out.seeds == [1, 2, 3]
    assert np.abs(np.asarray(out.images[1], int) - np.asarray(alone, int)).max() <= 1


def test_images_come_as_they_are_finished(pipe):
    from sdrt.runtime import GenerationOptions

    result = pipe.stream([PROMPT] * 6, GenerationOptions(num_inference_steps=1, seed=0))
    assert next(result)[0].index == 0
    assert len(list(result)) == 5


def test_one_image_with_nan_does_not_lose_the_others(pipe):
    from dataclasses import replace

    from sdrt.errors import SdrtError
    from sdrt.runtime import GenerationOptions

    class Second(Counted):
        def __call__(self, feeds):
            self.rows.append(1)
            image = self.engine(feeds)["image"]
            return {"image": image * np.nan if len(self.rows) == 2 else image}

    decoder = Second(pipe.engines["vae_decoder"])
    own = replace(pipe, engines={**pipe.engines, "vae_decoder": decoder})
    result = own.stream([PROMPT] * 3, GenerationOptions(num_inference_steps=1, seed=5))
    actual = []
    with pytest.raises(SdrtError, match="seed 6: the image holds NaN"):
        for request, _ in result:
            actual.append(request.seed)
    assert actual == [5, 7]


def test_a_callback_that_raises_ends_the_run_with_its_own_error(pipe):
    def callback(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe(PROMPT, num_inference_steps=2, seed=0, callback_on_step_end=callback)
    assert pipe(PROMPT, num_inference_steps=1, seed=0).images


def rotated(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif, image.rotate(90, expand=True)


def test_images_of_every_kind_are_read(source, tmp_path):
    from sdrt.runtime.images import image_to_array, open_image

    expected = image_to_array(source, (64, 64))
    exif, turned = rotated(source)
    turned.save(tmp_path / "turned.png", exif=exif)
    clear = source.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    source.convert("CMYK").save(tmp_path / "cmyk.tiff")
    deep = np.asarray(source.convert("L"), np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(image_to_array(open_image(tmp_path / "turned.png"), (64, 64)), expected)
    assert (image_to_array(open_image(tmp_path / "clear.png"), (64, 64)) == 1.0).all()
    assert (
        np.abs(image_to_array(open_image(tmp_path / "cmyk.tiff"), (64, 64)) - expected).max() < 0.2
    )
    grey = image_to_array(source.convert("L"), (64, 64))
    assert np.array_equal(image_to_array(open_image(tmp_path / "deep.png"), (64, 64)), grey)


def test_images_that_cannot_be_read_are_refused(tmp_path):
    from sdrt.runtime.images import image_to_array, open_image

    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UsageError, match="not a readable"):
        open_image(tmp_path / "text.png")
    with pytest.raises(UsageError, match="does not exist"):
        open_image(tmp_path / "none.png")
    Image.new("1", (20_000, 20)).save(tmp_path / "wide.png")
    with pytest.raises(UsageError, match="20000x20"):
        open_image(tmp_path / "wide.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:600])
    with pytest.raises(UsageError, match="failed to decode"):
        image_to_array(open_image(tmp_path / "cut.png"), (64, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "strength is 1.5"),
        ({"strength": 0.01}, "less than one step"),
        ({"mask_image": Image.new("L", (64, 64))}, "mask is 64x64, the image 32x32"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "both"),
        ({"timesteps": [900, 100]}, "strength decides"),
    ],
)
def test_images_that_do_not_fit_are_refused(pipe, options, message):
    arguments = {"image": Image.new("RGB", (32, 32)), "num_inference_steps": 5, **options}
    with pytest.raises(UsageError, match=message):
        pipe(PROMPT, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_image": Image.new("L", (64, 64))}, "mask_image requires image"),
        ({"latents": np.zeros((1, 4, 9, 8), np.float32)}, "expected"),
        ({"latents": np.zeros((1, 4, 8, 8), np.int64)}, "int64"),
        ({"latents": np.full((1, 4, 8, 8), np.nan)}, "NaN"),
        ({"clip_skip": 3}, "3 layers"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"guidance_rescale": 2.0}, "guidance_rescale"),
        ({"rng": "mps"}, "cpu or cuda"),
        ({"long_prompts": "drop"}, "chunk or cut"),
        ({"guidence_scale": 3.0}, "did you mean guidance_scale"),
        ({"prompt_embeds": np.zeros((1, 32, 128), np.float32)}, "both"),
        ({"negative_prompt_embeds": np.zeros((1, 16, 128), np.float32)}, "one shape"),
        ({"timesteps": [100, 900]}, "descending"),
        ({"seed": [1, 2]}, "seed is a list of 2 for 1 image"),
    ],
)
def test_options_that_do_not_fit_are_refused(pipe, options, message):
    with pytest.raises(UsageError, match=message):
        pipe(PROMPT, **{"num_inference_steps": 2, **options})
