"""Resizing of latents as `torch.nn.functional.interpolate` resizes them, without torch.

Every mode is linear and separable: a matrix for each side. Knows arrays; not latents' meaning.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np

Mode = Literal["nearest", "nearest-exact", "bilinear", "bicubic"]


def interpolate(
    array: np.ndarray, sides: tuple[int, int], mode: Mode, antialias: bool = False
) -> np.ndarray:
    """Resize the last two axes, with `align_corners=False`.

    Args:
        array: [..., H, W].
        sides: (height, width) of the result.
        mode: Of the interpolation.
        antialias: Whether the filter widens where a side shrinks, as Pillow's filters do.

    Returns:
        [..., height, width] float32.
    """
    down = interpolation_matrix(array.shape[-2], sides[0], mode, antialias)  # [height, H]
    across = interpolation_matrix(array.shape[-1], sides[1], mode, antialias)  # [width, W]
    resized = down @ array.astype(np.float64) @ across.T
    return resized.astype(np.float32)


@lru_cache(maxsize=64)
def interpolation_matrix(old: int, new: int, mode: Mode, antialias: bool) -> np.ndarray:
    """The weights of a side's old values in its new ones, [new, old] float64."""
    if mode in ("nearest", "nearest-exact"):
        offset = 0.5 if mode == "nearest-exact" else 0.0
        places = np.floor((np.arange(new) + offset) * (old / new)).astype(int)
        weights = np.eye(old)[np.minimum(places, old - 1)]
    else:
        weights = _filter_matrix(old, new, mode, antialias)
    weights.flags.writeable = False
    return weights


def _filter_matrix(old: int, new: int, mode: Mode, antialias: bool) -> np.ndarray:
    """Of a filter: its taps beyond the border are left out with antialiasing, else repeat it."""
    kernel, reach = (_triangle, 1) if mode == "bilinear" else (_cubic(antialias), 2)
    widening = max(1.0, old / new) if antialias else 1.0
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5  # in old places
    radius = int(np.ceil(reach * widening))
    taps = np.floor(centres)[:, None] + np.arange(-radius, radius + 2)  # [new, taps]
    values = kernel(np.abs(taps - centres[:, None]) / widening)
    inside = (taps >= 0) & (taps < old)
    values = np.where(inside | (not antialias), values, 0.0)
    weights = np.zeros((new, old))
    rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    np.add.at(weights, (rows, np.clip(taps, 0, old - 1).astype(int)), values)
    normalized: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return normalized


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - distance, 0.0)


def _cubic(antialias: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Keys 1981, "Cubic convolution interpolation", eq. 4, with torch's two values of a."""
    a = -0.5 if antialias else -0.75

    def kernel(x: np.ndarray) -> np.ndarray:
        near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
        far = a * (((x - 5.0) * x + 8.0) * x - 4.0)
        return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))

    return kernel
