"""A type checker accepts what the pipeline accepts in users' scripts, and finds wrong names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import numpy as np
import torch
from PIL import Image

import sdrt
from sdrt import GenerationOptions, InflightBatcher, Output, Pipeline, Step

pipe: Pipeline = sdrt.load("shapes", device="cpu")
output: Output = pipe("a", num_inference_steps=3, seed=1, negative_prompt=None, size=(64, 64))
pipe(["a", "b"], height=64, width=64, generator=torch.Generator().manual_seed(1))
pipe("a", image=Image.new("RGB", (64, 64)), strength=0.5, mask_image="mask.png")
pipe("a", latents=np.zeros((1, 4, 8, 8)), generator=np.random.default_rng(0), eta=0.5)
pipe("a", latents=torch.zeros(1, 4, 8, 8), prompt_embeds=None, guidance_scale=0.0)
array: np.ndarray = pipe("a", output_type="np").images
images, flagged = pipe("a", return_dict=False)
steps: list[Step] = list(pipe.steps("a", num_inference_steps=3))
with InflightBatcher(pipe) as batcher:
    batcher.submit("a", num_inference_steps=3, seed=1, priority=3)
    batcher.submit("a", {"num_inference_steps": 3})
GenerationOptions(num_inference_steps=3)

pipe("a", num_inference_step=3)  # wrong: a name
pipe("a", steps=3)  # wrong: a name
pipe("a", num_inference_steps="3")  # wrong: a type
pipe("a", output_type="pt")  # wrong: a value
pipe.steps("a", num_inference_step=3)  # wrong: a name
batcher.submit("a", num_inference_step=3)  # wrong: a name
text: str = pipe("a").images  # wrong: a type
sdrt.load("shapes", devices=0)  # wrong: a name
"""


@pytest.fixture(scope="module")
def linked(tmp_path_factory):
    """The package as one folder, as a type checker sees an installed one."""
    folder = tmp_path_factory.mktemp("linked") / "package"
    link = [sys.executable, ROOT / "tools" / "link_package.py", folder]
    subprocess.run(link, check=True, capture_output=True)
    return folder


@pytest.mark.integration
def test_mypy_finds_wrong_arguments_and_no_others(linked):
    (linked / "script.py").write_text(SCRIPT)
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--cache-dir=/dev/null"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "script.py"],
        cwd=linked,
        capture_output=True,
        text=True,
    )
    errors = {int(line) for line in re.findall(r"^script\.py:(\d+): error", done.stdout, re.M)}
    lines = SCRIPT.split("\n")
    wrong = {i for i, line in enumerate(lines, 1) if "# wrong" in line}
    assert len(wrong) == 8 and errors == wrong, done.stdout
