"""`sdrt run --from`: what goes into an image's text makes the same pixels again."""

import hashlib
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdrt.bundle.store import home
from sdrt.cli import run as cli_run
from sdrt.cli.infotext import LOST, restored_from
from sdrt.cli.main import main
from sdrt.errors import UsageError
from sdrt.runtime import LoraWeight, Pipeline
from sdrt.runtime.images import image_to_bytes, save_image
from sdrt.runtime.options import PARSERS

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"
USUAL = {"num_inference_steps": 4, "seed": 3}
CARRIED = [
    {"seed": 2**64 - 1},
    {"num_inference_steps": 7},
    {"guidance_scale": 3.123456789012345},
    {"guidance_scale": 0.0},
    {"guidance_rescale": 0.7},
    {"guidance_interval": (0.25, 0.8)},
    {"feature_reuse": 2},
    {"feature_reuse": 3, "feature_reuse_order": 1},
    {"output_reuse": 3},
    {"rng": "cuda"},
    {"size": "96x64"},
    {"negative_prompt": "a white cross"},
    {"clip_skip": 1},
    {"timesteps": [901, 602, 303, 4]},
    {
        "hires_scale": 1.5,
        "hires_steps": 2,
        "hires_strength": 0.5123456789,
        "hires_upscaler": "Lanczos",
        "hires_guidance_scale": 3.25,
    },
    {
        "hires_size": (96, 64),
        "hires_scheduler": "Euler a",
        "hires_prompt": 'a "green", square: small',
        "hires_negative_prompt": "blue",
    },
    {"sigmas": [14.6, 3.123456789012345, 0.5, 0.0]},
]
IMAGES = [
    {"image": "image"},
    {"image": "image", "strength": 0.5123456789},
    {"image": "image", "mask_image": "mask"},
    {"image": "image", "mask_image": "mask", "strength": 0.6},
]
# These have tests of their own, below or where a model takes them.
ELSEWHERE = {"eta", "num_images_per_prompt", "long_prompts", "weighting", "depth_map"}
ELSEWHERE |= {name for name in PARSERS if "control" in name or "adapter" in name} | {"guess_mode"}
ELSEWHERE |= {name for name in PARSERS if "aesthetic" in name or "refiner" in name}
SIZES = {name for name in PARSERS if ("_size" in name and "hires" not in name) or "crops" in name}


@pytest.fixture(autouse=True)
def loaded(pipe, monkeypatch):
    """The command line runs on the pipeline that the test does."""

    def load(*_, embeddings, **__):
        pipe.embeddings.open(embeddings)
        return pipe

    monkeypatch.setattr(cli_run, "load", load)
    monkeypatch.setattr(Pipeline, "close", lambda self: None)
    yield
    pipe.set_lora({})
    pipe.unload_textual_inversion()


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    result = {"image": tmp_path / "image.jpg", "mask": tmp_path / "mask.png"}
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(result["image"])
    light = np.zeros((64, 64), np.uint8)
    light[16:] = 255
    Image.fromarray(light).save(result["mask"])
    return result


def pixels(image):
    return np.asarray(image.convert("RGB"))


def saved(pipe, path, prompt=PROMPT, **options):
    """An image's file."""
    out = pipe(prompt, **{**USUAL, **options})
    save_image(out.images[0], path, out.parameters[0])
    return path


def again(path, *arguments):
    """What `sdrt run --from` makes of an image's file."""
    output = path.with_name("again.png")
    assert main(["run", "--from", str(path), "-q", "--output", str(output), *arguments]) == 0
    return Image.open(output)


def assert_again(path, *arguments):
    result = again(path, *arguments)
    assert np.array_equal(pixels(result), pixels(Image.open(path)))
    texts = (image.text["parameters"].strip() for image in (result, Image.open(path)))
    assert len({re.sub(r"\s+", " ", text) for text in texts}) == 1


def name_of(options):
    return ",".join(f"{name}={value}"[:40] for name, value in options.items())


@pytest.mark.parametrize("options", CARRIED, ids=name_of)
def test_options_come_back(pipe, tmp_path, options):
    own = pipe.with_scheduler("Euler") if {"timesteps", "sigmas"} & {*options} else pipe
    path = saved(own, tmp_path / "a.png", **options)
    plain = pixels(own(PROMPT, **USUAL).images[0])
    assert not np.array_equal(pixels(Image.open(path)), plain)
    assert_again(path)


@pytest.mark.parametrize("options", IMAGES, ids=name_of)
def test_options_of_images_come_back_with_the_images(pipe, tmp_path, files, options):
    inputs = {name: files.get(value, value) for name, value in options.items()}
    path = saved(pipe, tmp_path / "a.png", **inputs)
    typed = ["--image", str(files["image"])]
    typed += ["--mask", str(files["mask"])] if "mask_image" in options else []
    assert_again(path, *typed)


@pytest.mark.parametrize(("typed", "missing"), [([], "--image"), (["--image"], "--mask")])
def test_what_a_text_cannot_hold_must_be_typed(pipe, tmp_path, files, capsys, typed, missing):
    path = saved(pipe, tmp_path / "a.png", image=files["image"], mask_image=files["mask"])
    typed = [*typed, str(files["image"])] if typed else []
    assert main(["run", "--from", str(path), *typed]) == 2
    assert f"give {missing}" in capsys.readouterr().err


def test_every_option_is_tested_for_its_return():
    tested = {name for options in CARRIED + IMAGES for name in options}
    lost = {"latents", "callback_on_step_end", *(name for name in PARSERS if "embeds" in name)}
    lost |= {"image_latents", "denoising_start", "denoising_end"}
    assert tested | ELSEWHERE | SIZES | lost == {*PARSERS}


@pytest.mark.parametrize(
    "options",
    [
        {"latents": np.ones((1, 4, 8, 8), np.float32)},
        {"callback_on_step_end": lambda *_: None},
        {"prompt_embeds": np.ones((1, 32, 128), np.float32)},
        {"negative_prompt_embeds": np.ones((1, 32, 128), np.float32)},
        {"image_latents": np.ones((1, 4, 8, 8), np.float32)},
        {"denoising_start": 0.5, "image_latents": np.ones((1, 4, 8, 8), np.float32)},
        {"denoising_end": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_text_cannot_hold_at_all_is_refused(pipe, tmp_path, options):
    prompt = None if "prompt_embeds" in options else PROMPT
    path = saved(pipe, tmp_path / "a.png", prompt, **options)
    with pytest.raises(UsageError, match="its text does not hold"):
        restored_from(path)
    assert len(LOST) == 7


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "(red:1.3) circle, [blue] BREAK a\n\nsquare",
        'a "red" circle\nNegative prompt: of the prompt',
        "a red circle\nSteps: 5, Sampler: DDIM, Seed: 7",
        "une étoile 红色 🔴",
        "  a red circle  ",
        "\x00a\tred circle\r\n",
    ],
)
def test_prompts_come_back(pipe, tmp_path, prompt):
    assert_again(saved(pipe, tmp_path / "a.png", prompt))
    assert_again(saved(pipe, tmp_path / "b.png", PROMPT, negative_prompt=prompt))


def test_how_prompts_are_read_comes_back(pipe, tmp_path):
    long = " ".join(f"(word:1.{i % 10}) red" for i in range(40))
    for options in ({"weighting": False}, {"long_prompts": "cut"}):
        path = saved(pipe, tmp_path / "a.png", long, **options)
        assert not np.array_equal(pixels(Image.open(path)), pixels(pipe(long, **USUAL).images[0]))
        assert_again(path)


@pytest.mark.parametrize(
    "scheduler",
    [
        "DPM++ 3M SDE Karras",
        "Euler a",
        "Euler Karras",
        "DPM++ 2M SGM Uniform",
        {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
        {"_class_name": "DDIMScheduler", "use_karras_sigmas": True},
        {"eta": 0.5, "_class_name": "DDIMScheduler"},
        {"_class_name": "DDIMScheduler", "clip_sample": True, "timestep_spacing": "trailing"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun", "beta_end": 0.011},
        {"_class_name": "EulerDiscreteScheduler", "beta_start": None, "steps_offset": 0},
    ],
    ids=str,
)
def test_samplers_come_back_with_their_options(pipe, tmp_path, scheduler):
    if isinstance(scheduler, dict):
        scheduler = {**pipe.scheduler_config, **scheduler}
    assert_again(saved(pipe.with_scheduler(scheduler), tmp_path / "a.png"))


@pytest.fixture
def lora(shapes):
    """A LoRA file in the folder of LoRAs."""
    rng = np.random.default_rng(0)
    path = home() / "loras" / "small, one.safetensors"
    path.parent.mkdir(exist_ok=True)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_"
    down, up = rng.normal(size=(4, 128)), rng.normal(size=(120, 4))
    tensors = {f"{key}A.weight": down, f"{key}B.weight": up}
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, path)
    yield path.stem
    path.unlink()


@pytest.mark.parametrize("weight", [0.7123456789, LoraWeight(1.0, -0.5)])
@pytest.mark.parametrize("weighting", [True, False])
def test_loras_come_back(pipe, tmp_path, lora, weight, weighting):
    plain = pixels(pipe(PROMPT, **USUAL).images[0])
    pipe.set_lora({lora: weight})
    path = saved(pipe, tmp_path / "a.png", weighting=weighting)
    pipe.set_lora({})
    assert not np.array_equal(pixels(Image.open(path)), plain)
    assert_again(path)


def test_every_image_of_a_call_comes_back(pipe, tmp_path):
    out = pipe([PROMPT, "a square"], num_images_per_prompt=2, negative_prompt=["a", "b"], **USUAL)
    for i, (image, text) in enumerate(zip(out.images, out.parameters, strict=True)):
        save_image(image, tmp_path / f"{i}.png", text)
        actual = pixels(again(tmp_path / f"{i}.png")).astype(int)
        assert np.abs(actual - pixels(image)).max() <= 1  # rounds otherwise in a batch of its own


def test_a_grid_comes_back(pipe, tmp_path):
    path = tmp_path / "grid.png"
    result = ["--num-images", "2", "--steps", "2", "--seed", "5", "-q", "--grid"]
    assert main(["run", PROMPT, "a, square", *result, "--output", str(path)]) == 0
    assert_again(path)
    assert main(["run", PROMPT, *result, "--output", str(path)]) == 0
    assert_again(path)


def test_what_is_typed_goes_first(pipe, tmp_path, lora):
    pipe.set_lora({lora: 1.0})
    own = pipe.with_scheduler({**pipe.scheduler_config, "steps_offset": 0})
    path = saved(own, tmp_path / "a.png", guidance_scale=3.0, clip_skip=1)
    pipe.set_lora({})
    typed = ["a square", "--seed", "9", "--scheduler", "Euler", "--clip-skip", "0"]
    text = again(path, *typed, "--lora", f"{lora}:0.5").text["parameters"]
    assert text.startswith(f"a square <lora:{lora}:0.5>\nSteps: 4, Sampler: Euler, CFG scale: 3, ")
    assert "Seed: 9" in text and "Clip skip" not in text and "Sampler options" not in text
    euler = saved(pipe.with_scheduler("Euler"), tmp_path / "b.png", timesteps=[900, 100])
    assert "Timesteps" not in again(euler, "--steps", "5").text["parameters"]


def theirs(path, last, prompt="a red circle", kind="PNG"):
    image = Image.new("RGB", (64, 64))
    path.write_bytes(image_to_bytes(image, f"{prompt}\nNegative prompt: green\n{last}", kind))
    return path


A1111 = "Steps: 5, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7, Seed: 7, Size: 64x64"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_texts_of_the_web_ui_are_used(pipe, tmp_path, kind):
    last = f"{A1111}, Model hash: 6ce0161689, Model: v1-5, Clip skip: 2, Version: v1.10.1"
    path = theirs(tmp_path / "a", last, kind=kind)
    result = again(path)
    own = pipe.with_scheduler("DPM++ 2M Karras")
    expected = own(
        "a red circle",
        negative_prompt="green",
        num_inference_steps=5,
        guidance_scale=7.0,
        seed=7,
        rng="cuda",  # what the web UI draws where it says nothing
        clip_skip=1,
    )
    assert np.array_equal(pixels(result), pixels(expected.images[0]))


def test_a_second_pass_of_the_web_ui_is_used(pipe, tmp_path):
    hires = (
        "Denoising strength: 0.5, Hires upscale: 2, Hires steps: 3, Hires sampler: Euler a, "
        "Hires upscaler: Latent (nearest-exact)"
    )
    result = again(theirs(tmp_path / "a", f"{A1111}, {hires}, Version: v1.10.1"))
    expected = pipe.with_scheduler("DPM++ 2M Karras")(
        "a red circle",
        negative_prompt="green",
        num_inference_steps=5,
        guidance_scale=7.0,
        seed=7,
        rng="cuda",
        hires_scale=2,
        hires_strength=0.5,
        hires_steps=3,
        hires_scheduler="Euler a",
        hires_upscaler="Latent (nearest-exact)",
    )
    assert np.array_equal(pixels(result), pixels(expected.images[0]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("Hires checkpoint: other", "Hires checkpoint"),
        ("Hires upscale: 2, Hires upscaler: 4x-Nothing", "unknown upscaler '4x-Nothing'"),
        ("Variation seed: 5", "Variation seed"),
        ("Tiling: True", "Tiling"),
        ("Emphasis: No norm", "not understood"),
        ("RNG: MPS", "not understood"),
        ("Clip skip: two", "not understood"),
        ("Denoising strength: 0.5", "--image"),
        ("Timesteps: a b", "not understood"),
        ('Sampler options: "[1]"', "not understood"),
        ("Schedule type: Turbo", "unknown"),
        ("Sampler: DPM adaptive", "unknown"),
        ("CFG scale: nan", "--guidance-scale is nan"),
        ("Size: 63x64", "multiple of 8"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, capsys, setting, message):
    path = theirs(tmp_path / "a.png", f"{A1111}, {setting}, Version: v1.10.1")
    assert main(["run", "--from", str(path), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_prompts_that_the_web_ui_reads_otherwise_are_refused(tmp_path, capsys):
    path = theirs(tmp_path / "a.png", f"{A1111}, Version: v1.10.1", "a red circle:1.5")
    assert main(["run", "--from", str(path), "--output", str(tmp_path)]) == 2
    assert "multiplies its guidance by 1.5" in capsys.readouterr().err


def test_changing_and_joined_prompts_of_the_web_ui_are_made(pipe, tmp_path):
    prompt = "a [red:blue:0.5] circle AND a [square|cross]:0.4"
    path = theirs(tmp_path / "a.png", f"{A1111}, Version: v1.10.1", prompt)
    result = again(path)
    options = {"negative_prompt": "green", "guidance_scale": 7.0, "seed": 7, "rng": "cuda"}
    own = pipe.with_scheduler("DPM++ 2M Karras")
    expected = own(prompt, num_inference_steps=5, **options)
    assert np.array_equal(pixels(result), pixels(expected.images[0]))
    assert expected.parameters[0].startswith(f"{prompt}\n")


def test_lora_files_outside_their_folder_must_be_typed(pipe, tmp_path, lora, capsys):
    inside = home() / "loras" / f"{lora}.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(inside).items()}
    outside = tmp_path / inside.name  # another file of the same name
    save_file(tensors, outside)
    pipe.set_lora({outside: 1.0})
    path = saved(pipe, tmp_path / "a.png")
    assert main(["run", "--from", str(path), "--output", str(tmp_path)]) == 2
    assert "give --lora" in capsys.readouterr().err
    pipe.set_lora({})
    assert_again(path, "--lora", str(outside))


def test_files_without_a_text_are_refused(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, message in (("a.png", "no text"), ("none.png", "does not exist")):
        assert main(["run", "--from", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_odd_texts_are_restored_or_refused(tmp_path):
    path, odd = tmp_path / "a.png", ["", "-1", "x", '"', "[]", "{}", "null", '"[[1]]"', "1e999"]
    refused = 0
    for key in (
        "Seed",
        "Seeds",
        "Prompts",
        "Negative prompts",
        "Prompt",
        "Lora",
        "Sampler options",
    ):
        for value in odd:
            theirs(path, f"{A1111}, Emphasis: None, {key}: {value}, Version: sdrt 0")
            try:
                restored_from(path)
            except UsageError:
                refused += 1
    assert refused > 30


def test_words_of_textual_inversion_come_back_by_their_hashes(pipe, tmp_path, capsys):
    file = tmp_path / "dot.safetensors"
    rng = np.random.default_rng(0)
    save_file({"emb_params": rng.normal(0, 0.02, (2, 128)).astype(np.float32)}, file)
    pipe.load_textual_inversion(file, token="<dot>")
    try:
        path = saved(pipe, tmp_path / "a.png", "a <dot> on a blue background")
    finally:
        pipe.unload_textual_inversion()
    short_hash = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert restored_from(path).embedding_hashes == {"<dot>": short_hash}
    assert_again(path, "--embedding", f"{file}:<dot>")
    pipe.unload_textual_inversion()
    assert main(["run", "--from", str(path), "--output", str(tmp_path)]) == 2
    assert "--embedding FILE:<dot>" in capsys.readouterr().err
