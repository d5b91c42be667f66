"""The images of the documentation, made by the project itself.

    python tools/docs_figures.py        # writes docs/images/*.png; needs the bundle `shapes`

A strip of images of the embedded model, and a sampler's table as a figure.
"""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

import sdrt
from sdrt.runtime import sampler_table

FOLDER = Path(__file__).parent.parent / "docs" / "images"
PROMPTS = (
    "a red circle on a blue background",
    "a small yellow triangle above a large green square on a black background",
    "a white cross on a green background",
    "a purple square and an orange circle on a white background",
    "a large orange triangle on a purple background",
    "a blue cross above a red square on a yellow background",
)
SIDE, GAP = 128, 8


def write_strip() -> None:
    """One image for each prompt, side by side, twice as large as the model makes them."""
    with sdrt.load("shapes", backend="onnxruntime") as pipe:
        images = pipe(list(PROMPTS), seed=0).images
    strip = Image.new("RGB", (len(images) * (SIDE + GAP) - GAP, SIDE), "white")
    for place, image in enumerate(images):
        strip.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (place * (SIDE + GAP), 0))
    strip.save(FOLDER / "shapes.png", optimize=True)


def write_matrices() -> None:
    """The tables of three samplers at 12 steps: which column each row reads, and how much."""
    names = ("DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler")
    figure, axes = plt.subplots(1, len(names), figsize=(10, 3.6), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        matrix = sampler_table({"_class_name": name}, 12).matrix
        largest = np.abs(matrix).max()
        shown = np.sign(matrix) * np.log1p(99 * np.abs(matrix) / largest) / np.log(100)
        axis.imshow(shown, cmap="RdBu", vmin=-1, vmax=1)
        axis.set_title(
            f"{name.removesuffix('Scheduler')}, {len(matrix) - 1} evaluations", fontsize=9
        )
        axis.set_xlabel("start noise and model outputs", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("input of evaluation k; last: the result", fontsize=8)
    figure.savefig(FOLDER / "sampler_tables.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_strip()
    write_matrices()
