"""The embedded model follows its prompts: 200 captions read back by plain image analysis."""

import json

import numpy as np
import pytest
from shapes_reader import NAMES, colour_name, verdict
from shapes_scenes import caption, draw, scene_from_random
from shapes_tokenizer import write_tokenizer

pytestmark = pytest.mark.integration

CAPTIONS = 200
FEW = 60


def scenes(count=CAPTIONS):
    rng = np.random.default_rng(2026)
    return [scene_from_random(rng) for _ in range(count)]


def verdicts_of(pipe, result, guidance_scale):
    out = pipe(
        [caption(scene) for scene in result],
        guidance_scale=guidance_scale,
        num_inference_steps=20,
        seed=0,
    )
    return [verdict(np.asarray(i), s) for i, s in zip(out.images, result, strict=True)]


def fractions(verdicts):
    """Of the captions, the share whose background, object colours and shapes are right."""
    return {
        "background": np.mean([v.background for v in verdicts]),
        "colour": np.mean([v.colour for v in verdicts]),
        "shape": np.mean([v.shape for v in verdicts]),
    }


@pytest.fixture(scope="module", params=[FEW, pytest.param(CAPTIONS, marks=pytest.mark.grid)])
def guided(pipe, request):
    return verdicts_of(pipe, scenes(request.param), 7.5)


def test_the_reader_reads_drawn_images():
    for scene in scenes():
        read = verdict(draw(scene, 64), scene)
        assert read.background and read.colour and read.shape, caption(scene)


def test_the_reader_sees_what_is_wrong():
    right, wrong = scenes()[:2]
    read = verdict(draw(wrong, 64), right)
    assert not (read.background and read.colour and read.shape)


def test_prompts_are_followed(guided):
    right = fractions(guided)
    assert right["background"] >= 0.95
    assert right["colour"] >= 0.95
    assert right["shape"] >= 0.85


def test_guidance_helps(pipe, guided):
    unguided = verdicts_of(pipe, scenes(FEW), 1.0)
    assert sum(fractions(guided[:FEW]).values()) > sum(fractions(unguided).values())


@pytest.mark.rest
def test_a_negative_prompt_moves_away_from_what_it_names(pipe):
    """Left to itself the model paints any background; a colour that is named becomes rarer."""
    prompt, count = "a white circle", 30
    plain = pipe(prompt, num_images_per_prompt=count, seed=0, num_inference_steps=20).images
    actual = [frame_colour(image) for image in plain]
    usual = max(NAMES, key=actual.count)
    negative = f"a white circle on {'an' if usual[0] in 'aeiou' else 'a'} {usual} background"
    moved = pipe(
        prompt,
        negative_prompt=negative,
        num_images_per_prompt=count,
        seed=0,
        num_inference_steps=20,
    ).images
    assert [frame_colour(image) for image in moved].count(usual) < actual.count(usual)


def frame_colour(image):
    return colour_name(np.asarray(image, np.float32)[:2].reshape(-1, 3))


def test_the_checkpoint_is_small_and_half(embedded):
    files = list(embedded.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    index = json.loads((embedded / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_the_tokenizer_is_the_one_trained_with(embedded, tmp_path):
    write_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text() == (embedded / "tokenizer" / name).read_text()
