"""Reads an image of the `shapes` world back: colours and shapes by plain image analysis.

Knows numpy and the palette; no model. `verdict` says which of a scene's words hold.
"""

from dataclasses import dataclass

import numpy as np
from shapes_scenes import COLOURS, SHAPES, Scene, signed_distance

NAMES = list(COLOURS)
PALETTE = np.array([COLOURS[name] for name in NAMES], np.float32)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which parts of the caption hold: the background, and every object's colour and shape."""

    background: bool
    colour: bool
    shape: bool


def colour_name(pixels: np.ndarray) -> str:
    """The palette's colour nearest to the median of pixels [N, 3]."""
    distance = np.linalg.norm(PALETTE - np.median(pixels, axis=0), axis=1)
    return NAMES[int(distance.argmin())]


def background_name(image: np.ndarray) -> str:
    """The colour of a two-pixel frame around the image [H, W, 3]."""
    inner = np.zeros(image.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    return colour_name(image[~inner])


def mask_of_object(image: np.ndarray) -> np.ndarray:
    """True where a pixel is nearer to the middle's difference than to the frame's colour."""
    inner = np.zeros(image.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    background = np.median(image[~inner], axis=0)
    distance = np.linalg.norm(image - background, axis=2)
    return distance > 0.5 * np.percentile(distance, 98)


def shape_name(mask: np.ndarray) -> str:
    """The shape whose ideal mask, fitted to the same box, overlaps best."""
    rows, columns = np.nonzero(mask)
    top, bottom = np.percentile(rows, (1, 99))
    left, right = np.percentile(columns, (1, 99))
    height, width = bottom - top + 1, right - left + 1
    y = (np.arange(mask.shape[0]) - top + 0.5) / height * 2 - 1
    x = (np.arange(mask.shape[1]) - left + 0.5) / width * 2 - 1
    overlaps = []
    for shape in SHAPES:
        radius = 1.0 / 0.88 if shape == "square" else 1.0
        ideal = signed_distance(shape, x[None, :], y[:, None], radius) < 0
        overlaps.append((mask & ideal).sum() / (mask | ideal).sum())
    return SHAPES[int(np.argmax(overlaps))]


def verdict(image: np.ndarray, scene: Scene) -> Verdict:
    """Compare an image [H, W, 3] with the scene that its caption names."""
    pixels = image.astype(np.float32)
    parts = [pixels]
    if len(scene.things) == 2:
        parts = np.array_split(pixels, 2, axis=0 if scene.words == "above" else 1)
    colour, shape = True, True
    for part, thing in zip(parts, scene.things, strict=True):
        mask = mask_of_object(part)
        colour &= colour_name(part[mask]) == thing.colour
        shape &= shape_name(mask) == thing.shape
    return Verdict(background_name(pixels) == scene.background, colour, shape)
