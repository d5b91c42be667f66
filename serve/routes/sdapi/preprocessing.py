"""Preprocessors of the ControlNet extension: which `module` there is, and how it is computed.

Knows images and settings; not units and not what reads the result.
"""

from dataclasses import dataclass

from PIL.Image import Image, Resampling

from sdrt.errors import UsageError
from sdrt.preprocessors import (
    DEFAULT_HIGH_THRESHOLD,
    DEFAULT_LOW_THRESHOLD,
    PREPROCESSORS,
    preprocess,
)
from sdrt.serve.image_encoding import MAX_PIXELS

# Preprocessors that leave an image as it is.
NO_MODULE = ("none", "")
MODULES = ("none", *PREPROCESSORS)


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """What a request asks for, in the extension's terms.

    Attributes:
        module: One of `MODULES`.
        resolution: The shorter side at which it is computed; None or negative: the image's.
        thresholds: The lower and the higher; None or negative: the default.
    """

    module: str
    resolution: int | None = None
    thresholds: tuple[float | None, float | None] = (None, None)

    def compute(self, image: Image) -> Image:
        """A control image, or the image itself without a module.

        Raises:
            UsageError: For settings out of bounds, and where a package is missing.
        """
        if self.module in NO_MODULE:
            return image
        low, high = (
            default if value is None or value < 0 else value
            for value, default in zip(
                self.thresholds, (DEFAULT_LOW_THRESHOLD, DEFAULT_HIGH_THRESHOLD), strict=True
            )
        )
        return preprocess(self.module, self._resize(image), low_threshold=low, high_threshold=high)

    def _resize(self, image: Image) -> Image:
        """The image with the shorter side asked for, in its own ratio."""
        if self.resolution is None or self.resolution < 0:
            return image
        scale = self.resolution / min(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        if self.resolution == 0 or width * height > MAX_PIXELS:
            raise UsageError(
                f"processor_res {self.resolution} of an image of {image.width}x{image.height}",
                hint=f"send a shorter side of 1 or more, for at most {MAX_PIXELS} pixels",
            )
        return image.resize((width, height), Resampling.LANCZOS)


def parse_module(module: str | None) -> str | None:
    """The module that a name means; None for one that is not supported."""
    name = (module or "none").strip().casefold()
    return "none" if name in NO_MODULE else name if name in MODULES else None
