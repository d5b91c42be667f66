"""`sdrt.upscale`: images through an upscaler's bundle or a filter, without a model.

Knows backends and the upscalers' names; what enlarges is imported when it is used.
"""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SCALE = 8.0


def upscale(
    image: "Image | str | os.PathLike[str]",
    upscaler: str = "Lanczos",
    scale: float = 2.0,
    *,
    backend: str = "auto",
) -> "Image":
    """Enlarge one image.

    Args:
        image: A PIL image of any mode, a path or an array.
        upscaler: `Lanczos`, `Nearest`, or the name or folder of a bundle of `sdrt build
            --upscaler`, which runs as often as it takes and is reduced by Lanczos to the size.
        scale: Of a side, 1 to 8.
        backend: As for `load`.

    Returns:
        An RGB image.

    Raises:
        UsageError: For an unknown upscaler, a scale out of range, and too large a result.
        BackendError: If no backend can run it.
    """
    (result,) = upscale_images([image], upscaler, scale, backend=backend)
    return result


def upscale_images(
    images: "Sequence[Image | str | os.PathLike[str]]",
    upscaler: str,
    scale: float,
    *,
    backend: str = "auto",
) -> "Iterator[Image]":
    """Enlarge images one after the other, as `upscale`, with an engine that is loaded once."""
    from .engine import select_backend
    from .runtime.images import MAX_SIDE, convert_to_rgb
    from .runtime.parsing import float_parser, parse_image
    from .runtime.upscaling import LatentUpscaler, Upscalers

    scale = float_parser(1.0, MAX_SCALE)("scale", scale)
    candidate = select_backend(backend, 0)
    upscalers = Upscalers(candidate.load)
    try:
        chosen = upscalers.find(upscaler)
        if isinstance(chosen, LatentUpscaler):
            raise UsageError(
                f"{chosen.title} enlarges latents, not images", hint="use Lanczos or a bundle"
            )
        for image in images:
            pixels = convert_to_rgb(parse_image("image", image))
            size = round(pixels.width * scale), round(pixels.height * scale)
            if max(size) > MAX_SIDE:
                raise UsageError(
                    f"the result would be {size[0]}x{size[1]}; expected sides of at most {MAX_SIDE}"
                )
            yield chosen.upscale(pixels, size)
    finally:
        upscalers.close()
