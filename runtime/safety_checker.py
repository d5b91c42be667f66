"""Whether a picture is shown: what the safety checker's distances decide, and what is told of it.

Knows numpy, Pillow and the component's interface: pixels in, distances to concepts out.
"""

import logging
from typing import Any

import numpy as np
from PIL import Image

from sdrt.engine import Engine

log = logging.getLogger(__name__)
# What CLIP's vision towers were trained on: Radford et al. 2021 (arXiv:2103.00020).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
CARE = np.float32(0.01)  # by how much the special concepts make the others stricter
FLAGGED = "flagged"
FLAT = (
    "a picture is one colour all over, as an overflow or broken weights leave it; unless that was "
    "asked for, type sdrt verify, or build with --fp32"
)


def clip_pixels(image: Image.Image, side: int) -> np.ndarray:
    """A picture as CLIP reads it, [1, 3, side, side] float32: the short side to `side` (bicubic),
    the middle cut out, normalised.
    """
    short = min(image.size)
    width, height = (side if length == short else side * length // short for length in image.size)
    whole = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.asarray(whole.crop((left, top, left + side, top + side)), np.float32)
    return ((pixels / np.float32(255.0) - MEAN) / DEVIATION).transpose(2, 0, 1)[None]


def concept_scores(special: np.ndarray, concepts: np.ndarray) -> np.ndarray:
    """Of every concept [17], above 0 where the picture shows it, from distances less thresholds,
    [3] and [17]; rounded to three digits, as the reference library decides.
    """
    care = np.float32(0.0)
    for score in special.astype(np.float32):
        care = CARE if np.round(score + care, 3) > 0 else care
    return np.round(concepts.astype(np.float32) + care, 3)


def apply_safety_checker(engine: Engine | None, images: list[Image.Image]) -> list[Image.Image]:
    """The pictures, in place of some a black one that `is_flagged`; warns of those that are flat.

    engine: None where the bundle has no safety checker
    """
    if any(is_flat(image) for image in images):
        log.warning(FLAT)
    if engine is None:
        return images
    return [_black_image(image) if _is_unsafe(engine, image) else image for image in images]


def _is_unsafe(engine: Engine, image: Image.Image) -> bool:
    found = engine({"pixels": clip_pixels(image, int(engine.inputs[0].shape[2]))})
    return bool((concept_scores(found["special"][0], found["concepts"][0]) > 0).any())


def _black_image(image: Image.Image) -> Image.Image:
    black = Image.new("RGB", image.size)
    black.info[FLAGGED] = True
    return black


def is_flagged(image: Image.Image) -> bool:
    """Whether the safety checker put black in the picture's place."""
    return bool(image.info.get(FLAGGED))


def is_flat(image: Image.Image) -> bool:
    """Whether the model made a picture one colour all over: an overflow or broken weights leave
    that, and now and then it is what was asked for, so that it is told and not refused.
    """
    right, low = image.width - 1, image.height - 1
    few = {image.getpixel(at) for at in ((0, 0), (right // 2, low // 2), (right, low))}
    if len(few) > 1 or is_flagged(image):
        return False
    bands: Any = image.getextrema()
    return all(least == most for least, most in bands)


def detect_marks(images: list[Image.Image]) -> tuple[list[bool], list[bool]]:
    """Which are flagged, and which flat."""
    return [is_flagged(image) for image in images], [is_flat(image) for image in images]
