"""`sdrt.preprocess`: control images from photographs.

Knows the preprocessors' names and settings; what computes them is imported when it is used.
"""

import os
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

PREPROCESSORS = ("canny",)
DEFAULT_LOW_THRESHOLD, DEFAULT_HIGH_THRESHOLD = 100, 200  # those of the published canny nets
MAX_THRESHOLD = 2040  # the largest gradient of 8-bit images


def preprocess(
    name: str,
    image: "Image | str | os.PathLike[str]",
    *,
    size: str | tuple[int, int] | None = None,
    low_threshold: float = DEFAULT_LOW_THRESHOLD,
    high_threshold: float = DEFAULT_HIGH_THRESHOLD,
) -> "Image":
    """A control image, as a ControlNet's training images were computed.

    Args:
        name: `canny`: edges (Canny 1986, A Computational Approach to Edge Detection).
        image: A PIL image of any mode, a path or an array.
        size: Of the result, `"512x512"` or (width, height); None is the image's. Edges that are
            resized afterwards are blurred, so pass the size of the images to generate.
        low_threshold: Gradient from which a pixel next to an edge belongs to it.
        high_threshold: Gradient from which a pixel is an edge.

    Returns:
        An RGB image, white edges on black.

    Raises:
        UsageError: For an unknown name, thresholds out of order, and without OpenCV.
    """
    from PIL.Image import Resampling

    from .bundle import parse_size
    from .runtime.images import convert_to_rgb
    from .runtime.parsing import float_parser, parse_image

    if name not in PREPROCESSORS:
        raise UsageError(
            f"unknown preprocessor {name!r}; known are {', '.join(PREPROCESSORS)}",
            hint="compute depth maps and poses with another tool, and pass them as images",
        )
    parse_threshold = float_parser(0, MAX_THRESHOLD)
    low = parse_threshold("low_threshold", low_threshold)
    high = parse_threshold("high_threshold", high_threshold)
    if low > high:
        raise UsageError(f"low_threshold {low:g} is above high_threshold {high:g}")
    pixels = convert_to_rgb(parse_image("image", image))
    if size is not None:
        side = parse_size(size if isinstance(size, str) else f"{size[0]}x{size[1]}")
        pixels = pixels if pixels.size == side else pixels.resize(side, Resampling.LANCZOS)
    return _canny(pixels, low, high)


def _canny(image: "Image", low: float, high: float) -> "Image":
    import numpy as np
    from PIL.Image import fromarray

    try:
        import cv2
    except ModuleNotFoundError as error:
        raise UsageError(
            f"canny requires {error.name}", hint="run `pip install 'sdrt[preprocessors]'`"
        ) from error
    edges = cv2.Canny(np.asarray(image), low, high)  # [H, W]
    return fromarray(np.asarray(edges, np.uint8)).convert("RGB")
