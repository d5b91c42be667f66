"""Upscalers by name: what enlarges latents, and what enlarges images.

Knows A1111's names, Pillow and interpolation; not where the result goes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdrt.errors import UsageError

from .interpolation import Mode, interpolate


@dataclass(frozen=True, slots=True)
class LatentUpscaler:
    """Interpolates latents; no image is decoded."""

    title: str
    mode: Mode
    antialias: bool = False

    def upscale(self, latents: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """[C, H/8, W/8] -> [C, *sides]."""
        return interpolate(latents, sides, self.mode, self.antialias)


@dataclass(frozen=True, slots=True)
class ImageUpscaler:
    """Enlarges an image.

    Attributes:
        title: Its name.
        scale: Of the model behind it; 1 for a filter, which reaches any size.
        enlarge: An image to one `scale` times as large.
        resampling: Of what is left to the size asked for.
    """

    title: str
    resampling: Image.Resampling = Image.Resampling.LANCZOS
    scale: int = 1
    enlarge: Callable[[Image.Image], Image.Image] | None = None

    def upscale(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """An RGB image in the size (width, height)."""
        while self.enlarge and (image.width < size[0] or image.height < size[1]):
            image = self.enlarge(image)
        return image if image.size == size else image.resize(size, self.resampling)


Upscaler = LatentUpscaler | ImageUpscaler
LATENT_UPSCALERS = (
    LatentUpscaler("Latent", "bilinear"),
    LatentUpscaler("Latent (antialiased)", "bilinear", antialias=True),
    LatentUpscaler("Latent (bicubic)", "bicubic"),
    LatentUpscaler("Latent (bicubic antialiased)", "bicubic", antialias=True),
    LatentUpscaler("Latent (nearest)", "nearest"),
    LatentUpscaler("Latent (nearest-exact)", "nearest-exact"),
)
FILTERS = (
    ImageUpscaler("Lanczos"),
    ImageUpscaler("Nearest", Image.Resampling.NEAREST),
)


def find_upscaler(name: str) -> Upscaler:
    """The upscaler of a name, in any case.

    Raises:
        UsageError: For an unknown name.
    """
    known: dict[str, Upscaler] = {
        entry.title.casefold(): entry for entry in (*LATENT_UPSCALERS, *FILTERS)
    }
    if upscaler := known.get(name.strip().casefold()):
        return upscaler
    raise UsageError(
        f"unknown upscaler {name!r}",
        hint=f"one of {', '.join(entry.title for entry in known.values())}",
    )
