"""What an IP-Adapter of the `shapes` model learns from: lone shapes as captions can tell them, and
what there is to see of one.

Knows scenes, numpy and torch's tensors; no model.
"""

from dataclasses import replace

import numpy as np
import torch
from shapes_scenes import COLOURS, PLACES, RADII, SHAPES, Scene, scene_from_random
from torch import Tensor

JITTER = 0.03  # of a shape's place, as in `scene_from_random`
COARSE = 8  # pixels along a side of the image at a low resolution
DESCRIPTION = 3 + 3 + len(SHAPES) + 3 + 3 * COARSE**2
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's pixels
STD = (0.26862954, 0.26130258, 0.27577711)


def lone_scene(rng: np.random.Generator) -> Scene:
    """A lone shape as the base model was trained on."""
    while len((scene := scene_from_random(rng)).things) > 1:
        pass
    return scene


def vary(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another scene of the same caption."""
    thing, (x, y) = scene.things[0], PLACES[scene.words] + rng.uniform(-JITTER, JITTER, 2)
    return replace(
        scene, things=(replace(thing, x=x, y=y, radius=rng.uniform(*RADII[thing.size])),)
    )


def describe(scene: Scene, image: np.ndarray) -> np.ndarray:
    """What an image encoder should see: colours, shape, place and size, and the image at a low
    resolution; [DESCRIPTION], float32, each about -1 to 1.
    """
    (thing,) = scene.things
    shape = [float(thing.shape == name) for name in SHAPES]
    place = [4 * thing.x - 2, 4 * thing.y - 2, 10 * thing.radius - 2]
    block = len(image) // COARSE
    coarse = image.reshape(COARSE, block, COARSE, block, 3).mean((1, 3)) / 127.5 - 1
    colours = [np.array(COLOURS[n]) / 127.5 - 1 for n in (scene.background, thing.colour)]
    return np.concatenate([*colours, shape, place, coarse.ravel()]).astype(np.float32)


def pixels_for_clip(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] float32, normalized as CLIP's."""
    unit = images.float() / 255.0
    return ((unit - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
