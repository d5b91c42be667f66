"""The scripts in examples/ run as a user runs them, on the embedded model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples"
IMAGES = {
    "text_to_image": ["text_to_image"],
    "compare_samplers": ["compare_samplers"],
    "image_to_image": ["image_to_image_0.3", "image_to_image_0.6", "image_to_image_0.9"],
    "controlnet": ["control_steered", "control_free", "control_edges"],
    "ip_adapter": [f"ip_adapter_{name}" for name in ("example", "alike", "free")],
    "hires": ["hires_0.35", "hires_0.7"],
    "inpainting": ["inpainting_original", "inpainting"],
    "changing_prompts": [
        *(f"prompt_{name}" for name in ("circle", "early", "late", "turns", "joined"))
    ],
    "lora": ["lora_0.0", "lora_0.5", "lora_1.0"],
    "textual_inversion": ["sun_blue", "sun_black"],
    "custom_loop": ["custom_loop"],
    "inflight_batching": ["inflight_0", "inflight_1", "inflight_2"],
    "openai_client": ["openai_client"],
    "callback": ["callback", "callback_preview", "callback_stopped"],
    "fastapi_embed": ["fastapi_embed"],
}


def run_example(name, folder, home):
    """The images that a script writes, by name."""
    environment = os.environ | {"SDRT_HOME": str(home)}
    command = [sys.executable, FOLDER / f"{name}.py"]
    subprocess.run(command, cwd=folder, env=environment, timeout=120, check=True)
    return {path.stem: np.asarray(Image.open(path)) for path in folder.glob("*.png")}


pytestmark = pytest.mark.integration


@pytest.fixture(params=IMAGES)
def example(request, shapes, home, tmp_path):
    if request.param == "openai_client":
        pytest.importorskip("openai")
    return request.param, run_example(request.param, tmp_path, home)


def test_each_script_writes_its_images(example, pipe):
    name, images = example
    assert sorted(images) == sorted(IMAGES[name])
    for pixels in images.values():
        assert pixels.shape[0] == (128 if name == "hires" else 64) and pixels.std() > 5.0
    first = images[IMAGES[name][0]]
    if name == "text_to_image":
        prompt = "a red circle on a blue background"
        expected = pipe(prompt, num_inference_steps=20, guidance_scale=7.5, seed=0).images[0]
        assert np.array_equal(first, expected)
    if name == "compare_samplers":
        assert first.shape == (64, 6 * 64, 3)
    if name == "custom_loop":
        assert np.abs(first - np.linspace(0, 255, 64)[None]).max() <= 1.0
    if name == "inpainting":
        unmasked = np.abs(first[:, :24].astype(int) - images["inpainting"][:, :24]).mean()
        new = np.abs(first[:, 40:].astype(int) - images["inpainting"][:, 40:]).mean()
        assert unmasked < 0.2 * new
    if name in ("lora", "image_to_image", "inflight_batching", "changing_prompts"):
        assert len({pixels.tobytes() for pixels in images.values()}) == len(IMAGES[name])


def test_the_table_lists_every_script():
    with_bundles = {"refiner.py"}  # its test is next to those of refiners
    scripts = {path.name for path in FOLDER.glob("*.py")}
    table = (FOLDER / "README.md").read_text("utf-8")
    assert scripts == {f"{name}.py" for name in IMAGES} | with_bundles
    assert all(f"[{name}]({name})" in table for name in scripts)
