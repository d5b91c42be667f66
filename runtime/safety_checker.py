"""The safety checker's decision, and images of one colour.

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
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
ADJUSTMENT = np.float32(0.01)  # how much stricter the special concepts make the others
FLAGGED = "flagged"
FLAT_WARNING = (
    "an image is one colour all over, which is how an overflow or broken weights show; unless that "
    "was the prompt, run `sdrt verify`, or build with --fp32"
)


def clip_pixels(image: Image.Image, side: int) -> np.ndarray:
    """An image as CLIP reads it: resized (bicubic) and cropped to its centre, normalized.

    Returns:
        [1, 3, side, side] float32.
    """
    short = min(image.size)
    width, height = (side if length == short else side * length // short for length in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32)
    return ((pixels / np.float32(255.0) - MEAN) / STD).transpose(2, 0, 1)[None]


def concept_scores(special: np.ndarray, concepts: np.ndarray) -> np.ndarray:
    """Score every concept, above 0 where the image shows it; rounded as diffusers does.

    Args:
        special: [3], distances to the special concepts less their thresholds.
        concepts: [17], the same of the other concepts.

    Returns:
        [17].
    """
    adjustment = np.float32(0.0)
    for score in special.astype(np.float32):
        adjustment = ADJUSTMENT if np.round(score + adjustment, 3) > 0 else adjustment
    return np.round(concepts.astype(np.float32) + adjustment, 3)


def apply_safety_checker(engine: Engine | None, images: list[Image.Image]) -> list[Image.Image]:
    """Replace flagged images with black ones, and warn of images of one colour.

    Args:
        engine: None where the bundle has no safety checker.
        images: Of the decoder.
    """
    if any(is_flat(image) for image in images):
        log.warning(FLAT_WARNING)
    if engine is None:
        return images
    return [_black_image(image) if _is_unsafe(engine, image) else image for image in images]


def _is_unsafe(engine: Engine, image: Image.Image) -> bool:
    outputs = engine({"pixels": clip_pixels(image, int(engine.inputs[0].shape[2]))})
    return bool((concept_scores(outputs["special"][0], outputs["concepts"][0]) > 0).any())


def _black_image(image: Image.Image) -> Image.Image:
    black = Image.new("RGB", image.size)
    black.info[FLAGGED] = True
    return black


def is_flagged(image: Image.Image) -> bool:
    """Whether the safety checker replaced this image."""
    return bool(image.info.get(FLAGGED))


def is_flat(image: Image.Image) -> bool:
    """Whether an image is one colour all over and not flagged.

    An overflow or broken weights leave that. Now and then it is what the prompt describes, so it is
    reported and not refused.
    """
    right, low = image.width - 1, image.height - 1
    samples = {image.getpixel(at) for at in ((0, 0), (right // 2, low // 2), (right, low))}
    if len(samples) > 1 or is_flagged(image):
        return False
    bands: Any = image.getextrema()
    return all(low == high for low, high in bands)


def detect_marks(images: list[Image.Image]) -> tuple[list[bool], list[bool]]:
    """Of each image, whether it is flagged, and whether it is flat."""
    return [is_flagged(image) for image in images], [is_flat(image) for image in images]
