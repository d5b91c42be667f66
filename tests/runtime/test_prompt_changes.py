"""Images of prompts that change during the run, and of several joined by `AND`: against A1111's own
loop over diffusers' modules, with the texts of every evaluation written by hand.
"""

from functools import cache

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.errors import UsageError
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.batching.engine import InflightBatcher

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

STEPS = 8
CIRCLE, SQUARE = "a red circle on a blue background", "a yellow square on a black background"
GRADIENT = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


@pytest.fixture(scope="module")
def reference(embedded):
    """A function that runs A1111's denoiser: rows of an evaluation, composed with weights."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    base = diffusers.StableDiffusionPipeline.from_pretrained(embedded).to(dtype=torch.float32)

    @cache
    def encode(text):
        return base.encode_prompt(text, "cpu", 1, False)[0]

    @torch.no_grad()
    def run(own, evaluations, *, weights=(1.0,), scale=7.5, skipped=0, image=None):
        """evaluations: of each its negative text, then one of each prompt"""
        config = own.scheduler_config
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator("cpu").manual_seed(0)
        timesteps = scheduler.timesteps[skipped:]
        if image is not None:
            pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1.0)
            latents = base.vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist.sample(generator)
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        x = noise * scheduler.init_noise_sigma
        if image is not None:
            x = scheduler.add_noise(latents * base.vae.config.scaling_factor, noise, timesteps[:1])
        for k, timestep in enumerate(timesteps):
            negative, *prompts = evaluations[k]
            rows = [encode(text) for text in (negative, *prompts)]
            scaled = scheduler.scale_model_input(x, timestep).repeat(len(rows), 1, 1, 1)
            uncond, *conds = base.unet(scaled, timestep, torch.cat(rows)).sample.chunk(len(rows))
            output = uncond.clone()
            for cond, weight in zip(conds, weights, strict=True):
                output += (cond - uncond) * (weight * scale)
            options = {"generator": generator} if "Ancestral" in config["_class_name"] else {}
            x = scheduler.step(output, timestep, x, **options).prev_sample
        return base.vae.decode(x / base.vae.config.scaling_factor).sample.numpy()

    return run


def decibels(own, prompt, expected, **options):
    *_, last = own.steps(prompt, **{"num_inference_steps": STEPS, "seed": 0, **options})
    actual, expected = (
        np.clip(image.astype(np.float64) / 2 + 0.5, 0, 1)
        for image in (own.decode_to_array(last.latents), expected)
    )
    return 10 * np.log10(1.0 / max(np.mean((actual - expected) ** 2), 1e-12))


def spread(*counted, negative=""):
    """Texts with their number of evaluations, of one prompt."""
    return [(negative, text) for text, count in counted for _ in range(count)]


CHANGE = f"[{CIRCLE}:{SQUARE}:3]"


@pytest.mark.parametrize(
    ("sampler", "prompt", "evaluations"),
    [
        ("DDIM", CHANGE, spread((CIRCLE, 4), (SQUARE, 4))),
        ("Euler a", CHANGE, spread((CIRCLE, 4), (SQUARE, 4))),
        ("UniPC", f"[{CIRCLE}:{SQUARE}:.5]", spread((CIRCLE, 5), (SQUARE, 3))),
        ("PLMS", f"[{CIRCLE}:{SQUARE}:.5]", spread((CIRCLE, 5), (SQUARE, 4))),
        # Two evaluations a step: 15 in all of 16 counted, a fraction is of those.
        ("Heun", f"[{CIRCLE}:{SQUARE}:.5]", spread((CIRCLE, 9), (SQUARE, 6))),
        ("DPM2", CHANGE, spread((CIRCLE, 4), (SQUARE, 11))),
        (
            "DPM++ 2M",
            "a [red|green] circle on a blue background",
            spread(
                *(
                    (f"a {color} circle on a blue background", 1)
                    for color in (["red", "red", "green", "red", "green", "red", "green", "red"])
                )
            ),
        ),
    ],
)
def test_images_of_changing_prompts_are_a1111s(pipe, reference, sampler, prompt, evaluations):
    own = pipe.with_scheduler(sampler)
    expected = reference(own, evaluations)
    assert decibels(own, prompt, expected) >= 50
    assert decibels(own, CIRCLE, expected) < 40  # it does something


def test_negative_prompts_change_too(pipe, reference):
    own = pipe.with_scheduler("DPM++ 2M")
    texts = spread((CIRCLE, 3), negative="red") + spread((CIRCLE, 5), negative="blue")
    expected = reference(own, texts, scale=12.0)
    options = {"guidance_scale": 12.0}
    assert decibels(own, CIRCLE, expected, negative_prompt="[red:blue:2]", **options) >= 50
    assert decibels(own, CIRCLE, expected, negative_prompt="red", **options) < 45


@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "DPM++ 2M", "Heun"])
def test_joined_prompts_are_composed_as_a1111_does(pipe, reference, sampler):
    own = pipe.with_scheduler(sampler)
    texts = [("green", CIRCLE, SQUARE, "white")] * 16
    expected = reference(own, texts, weights=(1.0, 0.4, -0.3), scale=4.0)
    prompt = f"{CIRCLE} AND {SQUARE}:0.4 AND white :-.3"
    options = {"guidance_scale": 4.0, "negative_prompt": "green"}
    assert decibels(own, prompt, expected, **options) >= 50


def test_joined_prompts_without_guidance_still_have_a_negative_one(pipe, reference):
    texts = [("", CIRCLE, SQUARE)] * STEPS
    prompt = f"{CIRCLE} AND {SQUARE}"
    expected = reference(pipe.with_scheduler("DDIM"), texts, weights=(1.0, 1.0), scale=1.0)
    assert decibels(pipe.with_scheduler("DDIM"), prompt, expected, guidance_scale=1.0) >= 50


def test_joined_prompts_change_as_others_do(pipe, reference):
    own = pipe.with_scheduler("Euler")
    texts = [("", CIRCLE, "blue")] * 4 + [("", SQUARE, "blue")] * 4
    expected = reference(own, texts, weights=(1.0, 0.5), scale=5.0)
    assert decibels(own, f"{CHANGE} AND blue:0.5", expected, guidance_scale=5.0) >= 50


def test_a_run_from_an_image_counts_from_its_first_step(pipe, reference):
    own = pipe.with_scheduler("DDIM")
    texts = spread((CIRCLE, 3), (SQUARE, 3))
    expected = reference(own, texts, skipped=2, image=GRADIENT)
    options = {"image": GRADIENT, "strength": 0.75}
    assert decibels(own, f"[{CIRCLE}:{SQUARE}:2]", expected, **options) >= 50


JOBS = [
    (CHANGE, {"num_inference_steps": 6}, "DDIM"),
    ("a [red|green|blue] circle", {"num_inference_steps": 5}, "Heun"),
    (f"{CIRCLE} AND {SQUARE}:0.5", {"num_inference_steps": 7}, "Euler a"),
    (f"[{CIRCLE}:{SQUARE}:.3] AND a [cross|ring]:-.2", {"num_inference_steps": 6}, "DPM++ 2M"),
    (CIRCLE, {"num_inference_steps": 5, "guidance_interval": (0.2, 0.7)}, "UniPC"),
    ("a ring AND a cross:.3", {"num_inference_steps": 4, "guidance_rescale": 0.6}, "Euler"),
]


REST = pytest.mark.rest


@pytest.mark.parametrize(
    "backend",
    ["onnxruntime", pytest.param("openvino", marks=REST), pytest.param("torch", marks=REST)],
)
def test_in_flight_they_share_calls_and_keep_their_bytes(shapes, backend):
    with (
        sdrt.load(shapes, backend=backend) as pipe,
        InflightBatcher(pipe, rows=16, deterministic=backend != "onnxruntime") as batcher,
    ):
        handles = [
            batcher.submit(prompt, {**options, "seed": i}, scheduler=sampler)[0]
            for i, (prompt, options, sampler) in enumerate(JOBS)
        ]
        together = [handle.future.result(60) for handle in handles]
        for i, (prompt, options, sampler) in enumerate(JOBS):
            (alone,) = batcher.submit(prompt, {**options, "seed": i}, scheduler=sampler)
            expected = alone.future.result(60)
            assert together[i].image.tobytes() == expected.image.tobytes(), prompt
            assert together[i].parameters == expected.parameters
            assert prompt in expected.parameters


def test_a_call_with_several_kinds_of_prompts_is_each_by_itself(pipe):
    prompts = [prompt for prompt, *_ in JOBS]
    together = pipe(prompts, seed=[0] * len(prompts), num_inference_steps=4).images
    for prompt, image in zip(prompts, together, strict=True):
        alone = pipe(prompt, seed=0, num_inference_steps=4).images[0]
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1


def test_literal_prompts_have_none_of_this(pipe):
    with_syntax, literal = (
        pipe(CHANGE, seed=0, num_inference_steps=4, weighting=weighting).images[0].tobytes()
        for weighting in (True, False)
    )
    plain = pipe("[" + CHANGE + "]", seed=0, num_inference_steps=4, weighting=False)
    assert len({with_syntax, literal, plain.images[0].tobytes()}) == 3


def test_features_are_not_reused_across_a_change(pipe):
    options = {"num_inference_steps": 8, "feature_reuse": 8, "seed": 0}
    own = pipe.with_scheduler("DDIM")
    job = own.create_job([CHANGE, CIRCLE], parse_options(options))
    timelines = [job.get_timeline(request) for request in job.requests]
    tables = [job.get_table(timeline).full_evaluations for timeline in timelines]
    assert tables[0].tolist() == [True, False, False, False, True, False, False, False]
    assert tables[1].tolist() == [True] + [False] * 7


def test_memory_and_batches_count_all_rows(pipe):
    options = parse_options({"num_images_per_prompt": 4})
    plain, joined = (
        pipe.create_job(prompt, options) for prompt in (CIRCLE, "a AND b AND c AND d AND e")
    )
    timelines = [job.get_timeline(job.requests[0]) for job in (plain, joined)]
    assert [joined.get_num_rows(timeline) for timeline in timelines] == [2, 6]
    assert joined.max_batch == max(1, 2 * plain.max_batch // 6)


def test_shorter_prompts_are_padded_as_a1111_pads_them(pipe):
    """The texts of a prompt with empty chunks; one that `AND` joins with its last vector."""
    length = pipe.tokenizer.length
    job = pipe.create_job(f"[red: {'a ' * 40}:2] AND blue", parse_options({"seed": 0}))
    (request,) = job.requests
    (schedule,) = pipe.encode_conditioning(
        [request], [job.get_timeline(request)], job.options, job.size
    )
    context = schedule.inputs["context"]
    assert context.shape[:2] == (4, 2 * length) and schedule.num_negative == 1
    encoder = pipe.text_encoders[0]

    def encode(text):
        (encoded,) = encoder.encode(encoder.tokenize([text], job.options).values(), 0).values()
        return encoded.context

    negative, before, after, blue = context
    assert np.array_equal(negative, np.concatenate([encode("")] * 2))
    assert np.array_equal(before, np.concatenate([encode("red"), encode("")]))
    assert len(encoder.tokenize(["a " * 40], job.options)["a " * 40]) == 2
    assert not np.array_equal(after[length:], encode(""))
    last = encode("blue")[-1:]
    assert np.array_equal(blue, np.concatenate([encode("blue"), last.repeat(length, axis=0)]))


def test_and_is_refused_where_there_is_no_negative_row(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "guidance_embedding_width", 32)
    with pytest.raises(UsageError, match="AND is unsupported by this model"):
        pipe.create_job("a AND b", parse_options({}))


def test_tokens_are_counted_of_the_longest_text(pipe):
    def count(prompt, **options):
        counted = pipe.count_tokens(prompt, **options)
        return counted.tokens, counted.limit

    room = pipe.tokenizer.length - 2
    assert count("") == (0, room) and count("a red circle") == (3, room)
    assert count("a (red:1.3) circle <lora:x:0.5>") == (3, room)
    assert count("a [red:red red red:2] AND blue") == (4, room)
    assert count("a [red|blue]", weighting=False)[0] > 3
    assert count("red BREAK blue") == (room + 1, 2 * room)
    assert count("red " * (room + 2)) == (room + 2, 2 * room)
    assert str(pipe.count_tokens("a red circle")) == f"3 of {room} tokens"
    with pytest.raises(UsageError, match="prompt is"):
        pipe.count_tokens(3)


def test_a_second_pass_counts_on_from_the_first(pipe):
    """Of 6 and 4 steps, as A1111 has it: step 8 is in the second, as 1.5 is; 0.5 is over."""
    own = pipe.with_scheduler("DDIM")
    options = {"num_inference_steps": 6, "seed": 0, "hires_scale": 2.0, "hires_steps": 4}

    def texts(prompt, **more):
        job = own.create_job(prompt, parse_options({**options, **more}))
        (request,) = job.requests
        first, second = job.get_timeline(request), job.hires.get_timeline(request)
        return "".join(first.prompts[0]), "".join(second.prompts[0])

    assert texts("[a:b:8]") == texts("[a:b:1.5]") == ("aaaaaa", "aaab")
    assert texts("[a:b:.5]") == ("aaaabb", "bbbb")
    assert texts("[a:b:2]", hires_prompt="[c|d]") == ("aaabbb", "ccdc")
    job = own.create_job("a", parse_options({**options, "hires_scheduler": "Heun"}))
    assert (job.prompt_steps, job.hires.job.prompt_steps) == (6, 8)

    def generate(prompt, **more):
        return own(prompt, **options, **more).images[0].tobytes()

    changed = generate(f"[{CIRCLE}:{SQUARE}:8]")
    assert changed not in (generate(CIRCLE), generate(CIRCLE, hires_prompt=SQUARE))
    assert generate(f"[{CIRCLE}:{SQUARE}:6]", hires_prompt=SQUARE) == generate(
        CIRCLE, hires_prompt=SQUARE
    )
    prompts = [f"{CIRCLE} AND {SQUARE}:0.5", CIRCLE]
    together = own(prompts, **{**options, "seed": [0, 0]}).images
    for prompt, image in zip(prompts, together, strict=True):
        assert image.tobytes() == generate(prompt)
