"""One seed is one image: again, in other processes, in other places of a batch. And images of
one colour, which are reported.
"""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sdrt.runtime.safety_checker import is_flat

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"


@pytest.fixture
def flat(pipe):
    """The pipeline with a decoder whose last layer gives its bias for every pixel."""
    decoder = pipe.engines["vae_decoder"]
    weights = {"decoder.conv_out.weight": np.zeros((3, 16, 3, 3), np.float32)}
    decoder.refit(weights)
    yield pipe
    decoder.refit({})


def test_processes_generate_the_same_bytes(shapes, tmp_path):
    files = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        (folder := tmp_path / seed).mkdir()
        command = [sys.executable, "-m", "sdrt", "run", "--quiet", "--bundle", str(shapes)]
        command += ["--steps", "4", "--seed", "3", "--num-images", "2", "--output", "a.png"]
        subprocess.run([*command, PROMPT], cwd=folder, env=environment, check=True)
        files.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert len(files[0]) == 2 and files[0] == files[1]


def test_places_in_a_batch_generate_the_same_bytes(pipe):
    orders = [[5, 9, 7], [9, 7, 5], [7, 5, 9]]
    generated = [pipe([PROMPT] * 3, num_inference_steps=4, seed=order).images for order in orders]
    for seed in (5, 9, 7):
        same = {
            images[order.index(seed)].tobytes()
            for order, images in zip(orders, generated, strict=True)
        }
        assert len(same) == 1


@pytest.mark.parametrize(("colours", "expected"), [([7], True), ([7, 8], False), ([0], True)])
def test_one_other_pixel_is_not_flat(colours, expected):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:], pixels[4, 4, 1] = colours[0], colours[-1]
    assert is_flat(Image.fromarray(pixels)) == expected


def test_a_flat_image_is_reported(flat, caplog):
    with caplog.at_level(logging.WARNING, "sdrt"):
        assert flat(PROMPT, num_inference_steps=2, seed=0).flat == [True]
    assert "one colour all over" in caplog.text


def test_an_image_is_not_flat(pipe, caplog):
    assert pipe(PROMPT, num_inference_steps=2, seed=0).flat == [False]
    assert "one colour" not in caplog.text
