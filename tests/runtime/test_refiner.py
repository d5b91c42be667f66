"""A refiner, alone and after a base: tiny ones of random weights, against diffusers."""

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdrt
from sdrt.bundle import open_bundle
from sdrt.cli.main import main
from sdrt.engine import memory_budget
from sdrt.engine.memory_budget import compute_budget
from sdrt.errors import BackendError, UsageError
from sdrt.runtime import GenerationOptions
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.images import save_image
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
    part = {"seed": seed, "denoising_start": SWITCH, "image": latents}
    expected = refine(second, **part)
    actual = second(PROMPT, **part, **OPTIONS).images
    assert decibels(actual, expected) >= 50
    alone = first(PROMPT, seed=seed, **OPTIONS).images
    assert np.abs(alone - actual).max() > 1e-4


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


@pytest.fixture(scope="module")
def ensemble(tiny_xl_bundle, tiny_refiner_bundle):
    with sdrt.load(tiny_xl_bundle, backend="onnxruntime", refiner=tiny_refiner_bundle) as loaded:
        yield loaded


def run_in_two_calls(begin, refine, first, second, seed, **options):
    """diffusers' two calls with one generator; the latents of the result."""
    generator = torch.Generator("cpu").manual_seed(seed)
    part = {"generator": generator, "output_type": "latent", **options}
    latents = begin(first, denoising_end=SWITCH, **part)
    return refine(second, denoising_start=SWITCH, image=latents, **part)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [*SCHEDULERS, "EulerAncestralDiscreteScheduler"])
def test_one_call_is_diffusers_two_with_one_generator(ensemble, begin, refine, name, seed):
    own = ensemble.with_scheduler(name)
    expected = run_in_two_calls(begin, refine, own, own, seed)
    latents = {"num_inference_steps": STEPS, "output_type": "latent", "refiner_switch_at": SWITCH}
    actual = own(PROMPT, seed=seed, **latents).images
    assert decibels(actual, expected, np.abs(actual).max()) >= 50


def test_scores_and_sizes_go_to_the_model_that_reads_them(ensemble, begin, refine):
    own = ensemble.with_scheduler("Euler")
    generator = torch.Generator("cpu").manual_seed(0)
    part = {"generator": generator, "output_type": "latent", "original_size": (48, 40)}
    latents = begin(own, denoising_end=SWITCH, target_size=(64, 64), **part)
    scores = {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}
    expected = refine(own, denoising_start=SWITCH, image=latents, **scores, **part)
    options = {"num_inference_steps": STEPS, "refiner_switch_at": SWITCH, **scores}
    sizes = {"original_size": (48, 40), "target_size": (64, 64)}
    actual = own(PROMPT, seed=0, output_type="latent", **options, **sizes).images
    assert decibels(actual, expected, np.abs(actual).max()) >= 50


ONE_CALL = {"num_inference_steps": STEPS, "refiner_switch_at": SWITCH}


def test_without_a_switch_the_base_runs_alone(ensemble, base):
    options = {"seed": 3, "num_inference_steps": 3}
    alone, other = (p(PROMPT, **options).images[0] for p in (ensemble, base))
    assert alone.tobytes() == other.tobytes()
    both = ensemble(PROMPT, **options, refiner_switch_at=0.5).images[0]
    assert both.tobytes() != alone.tobytes()


def test_the_steps_are_counted_over_both_models(ensemble):
    steps = list(ensemble.with_scheduler("Euler").steps(PROMPT, seed=0, **ONE_CALL))
    assert [step.index for step in steps] == list(range(1, STEPS + 1))
    assert {step.total for step in steps} == {STEPS}


def test_in_flight_each_image_is_the_one_it_would_be_alone(ensemble):
    """Requests with other switches, and without a refiner, share calls of the base."""
    own = ensemble.with_scheduler("Euler")
    calls = [{"refiner_switch_at": at, "seed": i} for i, at in enumerate((0.8, 0.5, None, 0.8))]
    options = [{"num_inference_steps": 4 + i, **call} for i, call in enumerate(calls)]
    alone = [own(PROMPT, **call) for call in options]
    with sdrt.InflightBatcher(ensemble) as batcher:
        handles = [batcher.submit(PROMPT, scheduler="Euler", **call)[0] for call in options]
        results = [handle.future.result(120) for handle in handles]
    for result, output in zip(results, alone, strict=True):
        difference = np.asarray(result.image, int) - np.asarray(output.images[0], int)
        assert np.abs(difference).max() <= 1
        assert result.parameters == output.parameters[0]


def test_low_memory_makes_the_same_image(tiny_xl_bundle, tiny_refiner_bundle, ensemble):
    options = {"seed": 0, **ONE_CALL}
    expected = ensemble(PROMPT, **options).images[0]
    with sdrt.load(
        tiny_xl_bundle, backend="onnxruntime", refiner=tiny_refiner_bundle, low_memory=True
    ) as pipe:
        assert pipe(PROMPT, **options).images[0].tobytes() == expected.tobytes()


def test_a_changing_prompt_goes_on_in_the_refiner(ensemble):
    """The change after 0.8 is in the refiner's part."""
    own, latents = ensemble.with_scheduler("Euler"), {"output_type": "latent", "seed": 0}
    changing = own(f"[{PROMPT}:{NEGATIVE}:0.8]", **latents, **ONE_CALL).images
    plain = own(PROMPT, **latents, **ONE_CALL).images
    assert np.abs(changing - plain).max() > 1e-4
    job = own.validate(f"[{PROMPT}:{NEGATIVE}:0.8]", parse_options({"seed": 0, **ONE_CALL}))
    texts = job.refiner.get_timeline(job.requests[0]).prompts[0]
    assert texts == (PROMPT, NEGATIVE)
    assert set(job.get_timeline(job.requests[0]).prompts[0]) == {PROMPT}


def test_the_memory_of_both_counts(tiny_xl_bundle, tiny_refiner_bundle, monkeypatch):
    base, refiner = open_bundle(tiny_xl_bundle), open_bundle(tiny_refiner_bundle)
    alone = compute_budget(base.manifest, (32, 32), 2).total
    monkeypatch.setattr(memory_budget, "free_bytes", lambda gpu: alone)
    memory_budget.check_memory(base, None, False)
    with pytest.raises(BackendError, match="are free") as caught:
        memory_budget.check_memory(base, None, False, refiner=refiner)
    assert "--low-memory" in str(caught.value.hint)


def test_the_text_of_an_image_makes_it_again(
    ensemble, tiny_xl_bundle, tiny_refiner_bundle, tmp_path
):
    scores = {"aesthetic_score": 7.5}
    out = ensemble(PROMPT, seed=0, num_inference_steps=4, refiner_switch_at=0.6, **scores)
    text = out.parameters[0]
    name = open_bundle(tiny_refiner_bundle).manifest.name
    assert f"Refiner: {name}, Refiner switch at: 0.6, Aesthetic score: 7.5" in text
    assert "Denoising" not in text
    save_image(out.images[0], tmp_path / "a.png", text)
    typed = ["--bundle", str(tiny_xl_bundle), "--refiner", str(tiny_refiner_bundle)]
    typed += ["--backend", "onnxruntime", "-q", "--output", str(tmp_path / "b.png")]
    assert main(["run", "--from", str(tmp_path / "a.png"), *typed]) == 0
    again = Image.open(tmp_path / "b.png")
    assert again.text["parameters"] == text
    assert np.array_equal(np.asarray(again), np.asarray(out.images[0]))


def test_a_refiner_is_no_base_and_a_base_no_refiner(tiny_xl_bundle, tiny_refiner_bundle, shapes):
    for first, second, message in (
        (tiny_refiner_bundle, tiny_refiner_bundle, "cannot be the base of another"),
        (tiny_xl_bundle, tiny_xl_bundle, "is not a refiner"),
        (shapes, tiny_refiner_bundle, "0 time ids of the base|time ids"),
    ):
        with pytest.raises(UsageError, match=message):
            sdrt.load(first, backend="onnxruntime", refiner=second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": source()}, "image with refiner_switch_at"),
        ({"hires_scale": 2.0}, "a hires pass with refiner_switch_at"),
        ({"guidance_interval": (0.2, 0.8)}, "guidance_interval with refiner_switch_at"),
        ({"denoising_end": 0.9}, "denoising_end with refiner_switch_at"),
        ({"refiner_switch_at": 1.0}, "refiner_switch_at is 1"),
        ({"size": "48x32"}, "size 48x32 does not fit the refiner"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_an_ensemble_does_not_take_is_refused(ensemble, options, message):
    with pytest.raises(UsageError, match=message):
        ensemble(PROMPT, **{**ONE_CALL, "seed": 0, **options})


def test_a_switch_without_a_refiner_is_refused(base):
    with pytest.raises(UsageError, match="refiner_switch_at without a refiner"):
        base(PROMPT, refiner_switch_at=0.8)


def test_a_refiner_of_another_noise_schedule_is_refused(ensemble):
    config = {**ensemble.refiner.bundle_config, "beta_end": 0.02}
    other = replace(ensemble, refiner=replace(ensemble.refiner, bundle_config=config))
    with pytest.raises(UsageError, match=r"has beta_end 0\.02"):
        other(PROMPT, seed=0, **ONE_CALL)


def test_the_example_runs(tiny_xl_bundle, tiny_refiner_bundle, ensemble, tmp_path):
    script = Path(__file__).parents[2] / "examples" / "refiner.py"
    command = [sys.executable, script, tiny_xl_bundle, tiny_refiner_bundle, PROMPT]
    environment = os.environ | {"SDRT_BACKEND": "onnxruntime"}
    subprocess.run(command, cwd=tmp_path, env=environment, timeout=300, check=True)
    images = {path.stem: np.asarray(Image.open(path)) for path in tmp_path.glob("*.png")}
    assert sorted(images) == ["refiner_after", "refiner_base", "refiner_both"]
    options = {"num_inference_steps": 30, "seed": 7}
    for name, switch in (("base", {}), ("both", {"refiner_switch_at": 0.8})):
        expected = ensemble(PROMPT, **options, **switch).images[0]
        assert np.array_equal(images[f"refiner_{name}"], np.asarray(expected))
