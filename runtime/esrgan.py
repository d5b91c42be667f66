"""An ESRGAN of a bundle as an upscaler: images in tiles through its engine.

Knows the engine protocol and the bundle of an upscaler; not its network.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdrt.bundle.manifest import UPSCALER, Manifest
from sdrt.engine import Engine
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.engine.memory_estimator import format_bytes
from sdrt.errors import SdrtError, UsageError
from sdrt.process_stats import available_bytes

from .images import convert_to_rgb, images_from_decoded
from .vae import Tiling

BYTES_PER_PIXEL = 48  # of an enlarged image: sum, weighted tile, result and copies of its colours


def read_scale(manifest: Manifest) -> int:
    """By how much an upscaler's bundle enlarges a side."""
    (output,) = manifest.components[UPSCALER].outputs
    size = manifest.sizes[0]
    return spec_shape(output, axis_lengths(manifest, size))[2] // size[1]


@dataclass(frozen=True, slots=True)
class Esrgan:
    """Enlarges images by a network's own scale.

    Attributes:
        engine: image [B, 3, H, W] -> enlarged [B, 3, scale * H, scale * W], both in [0, 1].
        scale: Of a side.
        tile: (height, width) of what is processed at once; larger images are tiled with overlap.
        multiple: Pixels that the sides of what is processed are multiples of.
    """

    engine: Engine
    scale: int
    tile: tuple[int, int]
    multiple: int = 1

    def enlarge(self, image: Image.Image) -> Image.Image:
        """An RGB image, `scale` times as large.

        Raises:
            SdrtError: The result holds NaN or infinity.
        """
        pixels = np.asarray(convert_to_rgb(image), np.float32).transpose(2, 0, 1)[None]
        height, width = pixels.shape[2:]
        _check_memory(width * self.scale, height * self.scale)
        odd = [(0, -side % self.multiple) for side in (height, width)]
        padded = np.pad(pixels / np.float32(255.0), ((0, 0), (0, 0), *odd), mode="edge")
        enlarged = Tiling([self.tile], self.scale).decode(self._run, padded)
        if not np.isfinite(enlarged).all():
            raise SdrtError("the enlarged image holds NaN or infinity, so it was not written")
        cropped = enlarged[:, :, : height * self.scale, : width * self.scale]
        return images_from_decoded(cropped * np.float32(2.0) - np.float32(1.0))[0]

    def _run(self, tile: np.ndarray) -> np.ndarray:
        return self.engine({"image": tile})["enlarged"].astype(np.float32, copy=False)


def _check_memory(width: int, height: int) -> None:
    """Raise UsageError unless the arrays of an enlarged image have room."""
    needed, free = BYTES_PER_PIXEL * width * height, available_bytes()
    if needed > free:
        raise UsageError(
            f"enlarging to {width}x{height} needs about {format_bytes(needed)} of memory; "
            f"{format_bytes(free)} are free",
            hint="choose a smaller scale",
        )
