"""What a call returns: images that carry their settings, and access as to diffusers' outputs."""

import copy
import pickle

import numpy as np
import pytest
from PIL import Image

from sdrt.cli import run as cli_run
from sdrt.cli.main import main
from sdrt.runtime import Pipeline
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.images import read_parameters

PROMPT = "a red circle"
QUICK = {"num_inference_steps": 1, "seed": 3}


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", [PROMPT, "ein roter Kreis für dich"])
def test_an_image_that_pillow_saves_has_its_settings(pipe, tmp_path, suffix, prompt):
    out = pipe(prompt, **QUICK)
    path = tmp_path / f"a.{suffix}"
    out.images[0].save(path)
    assert read_parameters(Image.open(path)) == out.parameters[0]
    with (tmp_path / "b").open("wb") as file:
        out.images[0].save(file, format=Image.open(path).format)
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_the_saved_file_is_that_of_the_command_line(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_run, "load", lambda *_, **__: pipe)
    monkeypatch.setattr(Pipeline, "close", lambda self: None)
    pipe(PROMPT, **QUICK).images[0].save(tmp_path / "a.png")
    typed = ["--steps", "1", "--seed", "3", "-q", "-o", str(tmp_path / "b.png")]
    assert main(["run", PROMPT, *typed]) == 0
    first, second = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert first.text == second.text and first.tobytes() == second.tobytes()


def test_settings_can_be_left_out_or_replaced(pipe, tmp_path):
    image = pipe(PROMPT, **QUICK).images[0]
    image.save(tmp_path / "a.png", pnginfo=None)
    image.save(tmp_path / "a.bmp")
    assert not Image.open(tmp_path / "a.png").text
    assert not read_parameters(Image.open(tmp_path / "a.bmp"))
    del image.info["parameters"]
    image.save(tmp_path / "b.png")
    assert not Image.open(tmp_path / "b.png").text


def test_a_changed_image_does_not_claim_the_settings(pipe, tmp_path):
    image = pipe(PROMPT, **QUICK).images[0]
    image.resize((32, 32)).save(tmp_path / "a.png")
    assert not Image.open(tmp_path / "a.png").text


def test_an_annotated_image_is_an_image_like_others(pipe):
    image = pipe(PROMPT, **QUICK).images[0]
    again = pipe(PROMPT, **QUICK).images[0]
    assert isinstance(image, Image.Image) and image == again
    for other in (pickle.loads(pickle.dumps(image)), copy.copy(image)):  # noqa: S301
        assert np.array_equal(np.asarray(other), np.asarray(image))
        assert other.info == image.info
    assert pipe(PROMPT, image=image, strength=0.5, num_inference_steps=2).images


def test_images_in_flight_carry_their_settings(pipe, tmp_path):
    with InflightBatcher(pipe) as batcher:
        (handle,) = batcher.submit(PROMPT, **QUICK)
        result = handle.future.result(60)
    result.image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").text["parameters"] == result.parameters


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_outputs_are_indexed_as_in_diffusers(pipe, output_type):
    out = pipe(PROMPT, output_type=output_type, **QUICK)
    assert out[0] is out.images and out["images"] is out.images
    assert out[1] == out.nsfw_content_detected == [False]
    assert out[:2] == out.to_tuple() and out["seeds"] == [3]
    with pytest.raises(IndexError):
        out[2]
    with pytest.raises(TypeError, match="not iterable"):
        iter(out)
