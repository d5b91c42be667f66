"""Models with two text encoders and sizes: a tiny one of random weights, against the reference."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image

import sdrt
from sdrt.errors import UsageError
from sdrt.runtime.arguments import parse_options

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PROMPT = "a red circle on a blue background"
NEGATIVE = "a green cross"
STEPS = 6
SIDE = 32


@pytest.fixture(scope="module")
def pipe(tiny_xl_bundle):
    with sdrt.load(tiny_xl_bundle, backend="onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(tiny_xl):
    """A function that runs one of the reference's pipelines with a scheduler of ours."""
    clip = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    parts = {
        name: getattr(transformers, kind).from_pretrained(tiny_xl / name).eval()
        for name, kind in clip.items()
    }
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        parts[name] = transformers.CLIPTokenizer.from_pretrained(
            str(tiny_xl / name), pad_token=pad, model_max_length=32
        )
    parts["unet"] = diffusers.UNet2DConditionModel.from_pretrained(tiny_xl / "unet").eval()
    parts["vae"] = diffusers.AutoencoderKL.from_pretrained(tiny_xl / "vae").eval()

    def run(kind, own, seed=0, **arguments):
        config = own.scheduler_config
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        result = getattr(diffusers, kind)(**parts, scheduler=scheduler, add_watermarker=False)
        result.set_progress_bar_config(disable=True)
        return result(
            generator=torch.Generator("cpu").manual_seed(seed),
            num_inference_steps=STEPS,
            output_type="np",
            **{"guidance_scale": 7.5, **arguments},
        ).images[0]

    run.parts = parts
    return run


def decibels(own, expected, prompt=PROMPT, **options):
    *_, last = own.steps(prompt, **{"num_inference_steps": STEPS, "seed": 0, **options})
    actual = np.clip(own.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)
    return 10 * np.log10(1.0 / max(np.mean((actual.astype(np.float64) - expected) ** 2), 1e-12))


def source(size=(SIDE, SIDE)):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))


@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"],
)
def test_images_match_diffusers(pipe, reference, name):
    own = pipe.with_scheduler(name)
    expected = reference("StableDiffusionXLPipeline", own, prompt=PROMPT)
    assert decibels(own, expected) >= 50


CLIP = {"target_modules": ["q_proj", "out_proj", "fc1"], "init_lora_weights": False}
LORAS = {
    "text_encoder": {"r": 2, "lora_alpha": 2, "use_rslora": True, **CLIP},
    "text_encoder_2": {"r": 2, "lora_alpha": 1, "alpha_pattern": {r"layers\.[01].*fc1": 3}, **CLIP},
    "unet": {
        "r": 4,
        "lora_alpha": 2,
        "use_dora": True,
        "rank_pattern": {"attn2.to_.": 2},
        "target_modules": ["to_q", "to_k", "to_out.0", "conv1", "proj_in"],
        "init_lora_weights": False,
    },
}


def save_loras(parts, path):
    """Random adapters on the reference's parts, and the file that it saves of them."""
    from diffusers.training_utils import _collate_lora_metadata

    torch.manual_seed(0)
    for part, options in LORAS.items():
        parts[part].add_adapter(peft.LoraConfig(**options))
    state = {
        part: convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(parts[part]))
        for part in LORAS
    }
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        path.parent,
        weight_name=path.name,
        unet_lora_layers=state["unet"],
        text_encoder_lora_layers=state["text_encoder"],
        text_encoder_2_lora_layers=state["text_encoder_2"],
        **_collate_lora_metadata({part: parts[part] for part in LORAS}),
    )


def test_a_lora_of_every_layer_of_every_part_makes_the_references_image(
    pipe, reference, tmp_path, caplog
):
    """The first text encoder's last layer among them, which a bundle does not hold."""
    own = pipe.with_scheduler("DDIMScheduler")
    bare = reference("StableDiffusionXLPipeline", own, prompt=PROMPT)
    save_loras(reference.parts, tmp_path / "l.safetensors")
    caplog.set_level("INFO", "sdrt.runtime.lora.adapters")
    try:
        expected = reference("StableDiffusionXLPipeline", own, prompt=PROMPT)
        own.set_lora({tmp_path / "l.safetensors": 1.0})
        assert decibels(own, expected) >= 50 > 30 > decibels(own, bare)
        assert "nothing reads what comes of text_encoder." in caplog.text
    finally:
        own.set_lora({})
        reference.parts["unet"].delete_adapters("default")
        for part in ("text_encoder", "text_encoder_2"):
            reference.parts[part].delete_adapter("default")
    assert decibels(own, bare) >= 50


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_is_the_references(pipe, reference, name, strength):
    own, options = pipe.with_scheduler(name), {"image": source(), "strength": strength}
    expected = reference("StableDiffusionXLImg2ImgPipeline", own, prompt=PROMPT, **options)
    assert decibels(own, expected, **options) >= 50


def test_inpainting_is_the_references(pipe, reference):
    light = np.zeros((SIDE, SIDE), np.uint8)
    light[8:24, 0:16] = 255
    options = {"image": source(), "mask_image": Image.fromarray(light), "strength": 0.7}
    own, side = pipe.with_scheduler("EulerDiscreteScheduler"), {"width": SIDE, "height": SIDE}
    expected = reference("StableDiffusionXLInpaintPipeline", own, prompt=PROMPT, **side, **options)
    assert decibels(own, expected, **options) >= 50


SIZES = {"original_size": (512, 300), "crops_coords_top_left": (16, 4), "target_size": (64, 96)}
UNLIKE = {"negative_original_size": (100, 90), "negative_target_size": (1024, 1024)}


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"negative_prompt": NEGATIVE},
        {"guidance_rescale": 0.6},
        {"clip_skip": 1, "guidance_scale": 1.0},  # the reference leaves it out of the negative's
        SIZES,
        {**SIZES, **UNLIKE, "negative_crops_coords_top_left": (1, 2)},
    ],
    ids=lambda options: "+".join(options)[:40],
)
def test_options_are_the_references(pipe, reference, options):
    expected = reference("StableDiffusionXLPipeline", pipe, prompt=PROMPT, **options)
    assert decibels(pipe, expected, **options) >= 50


def test_sizes_of_an_image_to_start_from_are_the_references(pipe, reference):
    options = {"image": source(), "strength": 0.8, **SIZES, **UNLIKE}
    # The reference takes the crop of what is wanted for what is not.
    same = options | {"negative_crops_coords_top_left": SIZES["crops_coords_top_left"]}
    own = pipe.with_scheduler("EulerDiscreteScheduler")
    expected = reference("StableDiffusionXLImg2ImgPipeline", own, prompt=PROMPT, **options)
    assert decibels(own, expected, **same) >= 50


def test_every_size_tells_the_model_its_own(pipe, reference):
    expected = reference("StableDiffusionXLPipeline", pipe, prompt=PROMPT, width=48, height=32)
    assert expected.shape == (32, 48, 3)
    assert decibels(pipe, expected, size="48x32") >= 50


def embeddings():
    rng = np.random.default_rng(0)
    shapes = {"prompt_embeds": (1, 32, 40), "pooled_prompt_embeds": (1, 20)}
    return {
        f"{side}{name}": rng.normal(size=shape).astype(np.float32)
        for side in ("", "negative_")
        for name, shape in shapes.items()
    }


def test_embeddings_give_the_images_of_diffusers(pipe, reference):
    inputs = embeddings()
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    expected = reference("StableDiffusionXLPipeline", pipe, **tensors)
    assert decibels(pipe, expected, None, **inputs) >= 50


def test_an_empty_negative_prompt_is_read_where_the_model_says_so(pipe, reference):
    expected = reference("StableDiffusionXLPipeline", pipe, prompt=PROMPT, negative_prompt="")
    own = replace(pipe, manifest=replace(pipe.manifest, zero_empty_prompt=False))
    assert pipe.manifest.zero_empty_prompt
    assert decibels(own, expected) >= 50 > decibels(pipe, expected)


def test_one_image_is_the_same_whatever_is_in_its_batch(pipe):
    long = PROMPT + " BREAK " + NEGATIVE
    prompts = [PROMPT, NEGATIVE, long, PROMPT]
    together = pipe(prompts, seed=[1, 2, 3, 4], num_inference_steps=3).images
    for prompt, seed, image in zip(prompts, (1, 2, 3, 4), together, strict=True):
        alone = pipe(prompt, seed=seed, num_inference_steps=3).images[0]
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1


def conditioning(pipe, prompt, **options):
    job = pipe.validate(prompt, parse_options({"seed": 0, "guidance_scale": 1.0, **options}))
    timelines = [job.get_timeline(request) for request in job.requests]
    return pipe.encode_conditioning(job.requests, timelines, job.options, job.size)[0].inputs


def test_weights_act_on_both_contexts_and_not_on_pooled(pipe):
    plain, heavy = (
        conditioning(pipe, PROMPT),
        conditioning(pipe, PROMPT.replace("red", "(red:1.5)")),
    )
    assert plain["context"].shape == (1, 32, 40) and plain["time_ids"].tolist() == [
        [SIDE, SIDE, 0, 0, SIDE, SIDE]
    ]
    for columns in (slice(0, 16), slice(16, 40)):
        before, after = plain["context"][0, :, columns], heavy["context"][0, :, columns]
        assert before.mean() == pytest.approx(after.mean(), rel=1e-4)
        factors = np.median(after / before, axis=1)
        assert factors[2] == pytest.approx(1.5 * factors[1], rel=1e-4)
    assert np.array_equal(plain["pooled"], heavy["pooled"])


def test_the_pooled_prompt_is_of_the_first_chunk(pipe):
    first, both = conditioning(pipe, PROMPT), conditioning(pipe, PROMPT + " BREAK " + NEGATIVE)
    assert both["context"].shape == (1, 64, 40)
    assert np.array_equal(both["context"][:, :32], first["context"])
    assert np.array_equal(both["pooled"], first["pooled"])


def test_torch_generates_the_same_image(pipe, tiny_xl_bundle):
    options = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 0}
    expected = np.asarray(pipe(**options).images[0], int)
    with sdrt.load(tiny_xl_bundle, backend="torch") as other:
        assert np.abs(np.asarray(other(**options).images[0], int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"original_size": (512,)}, "original_size"),
        ({"target_size": (512, -1)}, "target_size"),
        ({"clip_skip": 2}, "2 layers"),
    ],
)
def test_options_that_do_not_fit_are_refused(pipe, options, message):
    with pytest.raises(UsageError, match=message):
        pipe(PROMPT, num_inference_steps=1, **options)


def test_embeddings_that_do_not_fit_are_refused(pipe):
    inputs = embeddings()
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        lacking = {key: value for key, value in inputs.items() if key != name}
        with pytest.raises(UsageError, match=f"without {name}"):
            pipe(None, num_inference_steps=1, **lacking)
    with pytest.raises(UsageError, match="pooled embeddings"):
        pipe(None, num_inference_steps=1, **inputs | {"pooled_prompt_embeds": np.zeros((1, 9))})
    with pytest.raises(UsageError, match="context is"):
        narrow = {"prompt_embeds": np.zeros((1, 32, 16)), "guidance_scale": 1.0}
        pipe(None, num_inference_steps=1, **inputs | narrow)


@pytest.mark.parametrize("option", ["original_size", "negative_pooled_prompt_embeds"])
def test_what_another_model_is_reported_is_refused(shapes, option):
    value = (64, 64) if "size" in option else np.zeros((1, 20))
    with (
        sdrt.load(shapes, backend="onnxruntime") as other,
        pytest.raises(UsageError, match=f"{option} is unsupported"),
    ):
        other(PROMPT, num_inference_steps=1, **{option: value})


def test_sizes_come_back_from_an_images_text(pipe, tiny_xl_bundle, tmp_path):
    from sdrt.cli.main import main
    from sdrt.runtime.images import save_image

    options = {
        "original_size": (64, 48),
        "crops_coords_top_left": (3, 5),
        "target_size": (16, 24),
        "negative_original_size": (8, 9),
        "negative_crops_coords_top_left": (0, 1),
        "negative_target_size": (10, 11),
    }
    out = pipe(PROMPT, num_inference_steps=2, seed=0, size="48x32", **options)
    save_image(out.images[0], tmp_path / "a.png", out.parameters[0])
    typed = ["--bundle", str(tiny_xl_bundle), "--backend", "onnxruntime", "-q"]
    again = tmp_path / "b.png"
    assert main(["run", "--from", str(tmp_path / "a.png"), *typed, "--output", str(again)]) == 0
    assert Image.open(again).text["parameters"] == out.parameters[0]
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(out.images[0]))
