"""Outlines of the `shapes` model's world: scenes whose place and size no caption tells, their
outlines as control images, and how well an image covers one.

Knows scenes and numpy; no model.
"""

from dataclasses import replace

import numpy as np
from shapes_reader import mask_of_object
from shapes_scenes import Scene, scene_from_random, signed_distance

RADII = (0.13, 0.3)
MARGIN = 0.04  # of the image's side, between a shape and the frame
PLAIN_SCENES = 0.25  # the fraction of scenes as the base model knows them
LINE = 1.0  # half the width of a line, in pixels of a 64x64 image
LINES = (0.5, 1.5)  # of those that are trained with


def free_scene(rng: np.random.Generator) -> Scene:
    """A lone shape of any place and size, of which its caption says nothing."""
    while len((scene := scene_from_random(rng)).things) > 1:
        pass
    radius = rng.uniform(*RADII)
    x, y = rng.uniform(radius + MARGIN, 1 - radius - MARGIN, 2)
    thing = replace(scene.things[0], size="", x=x, y=y, radius=radius)
    return replace(scene, things=(thing,), words="")


def scene_for_training(rng: np.random.Generator) -> Scene:
    """A free scene, or one as the base model was trained on."""
    return scene_from_random(rng) if rng.random() < PLAIN_SCENES else free_scene(rng)


def draw_outline(scene: Scene, side: int, half_width: float = LINE) -> np.ndarray:
    """White lines around every shape, on black, uint8 [side, side, 3]."""
    line, width = np.zeros((side, side), np.float32), half_width * side / 64
    for distance in _distances(scene, side):
        line = np.maximum(line, np.clip(width + 0.5 - np.abs(distance), 0.0, 1.0))
    return np.repeat(np.round(255 * line).astype(np.uint8)[..., None], 3, axis=2)


def filled_outline(scene: Scene, side: int) -> np.ndarray:
    """What lies inside the outlines, bool [side, side]."""
    inside = [distance < 0 for distance in _distances(scene, side)]
    return np.asarray(np.any(inside, axis=0))


def _distances(scene: Scene, side: int) -> list[np.ndarray]:
    """Of every pixel to each outline, in pixels, negative inside."""
    axis = np.arange(side, dtype=np.float32) + 0.5
    return [
        signed_distance(
            thing.shape,
            axis[None, :] - thing.x * side,
            axis[:, None] - thing.y * side,
            thing.radius * side,
        )
        for thing in scene.things
    ]


def outline_coverage(image: np.ndarray, scene: Scene) -> float:
    """Intersection over union of the shape in an image [H, W, 3] and the inside of its outline."""
    actual, expected = mask_of_object(image.astype(np.float32)), filled_outline(scene, len(image))
    return float((actual & expected).sum() / (actual | expected).sum())
