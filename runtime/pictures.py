"""Pictures at the edge: from the decoder's numbers to files that users' tools can read."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdrt.errors import UsageError


def images_from_decoded(decoded: np.ndarray) -> list[Image.Image]:
    """[B, 3, H, W] about [-1, 1] -> one RGB picture each, rounded to bytes."""
    unit = np.clip(decoded * 0.5 + 0.5, 0.0, 1.0)
    pixels = np.rint(unit * 255.0).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures, of one size, in rows of `columns` (default: as square as possible)."""
    if not images:
        raise UsageError("a grid of no pictures; give at least one")
    wide = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (wide * width, math.ceil(len(images) / wide) * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % wide * width, i // wide * height))
    return grid


def parameters_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """The text that users' tools read back: prompt, negative prompt, then `Key: value, ...`."""
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items()))
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path, parameters: str) -> None:
    """Write a PNG with its `parameters` text; the file appears whole or not at all."""
    info = PngInfo()
    info.add_itxt("parameters", parameters) if not parameters.isascii() else info.add_text(
        "parameters", parameters
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, "PNG", pnginfo=info)
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
