"""What `img2img` is given, made ready for the model as A1111 does it, and put back afterwards.

Knows images; no requests and no model. `size`: (width, height) of what the model makes. A mask is
light where the image is made new.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sdrt.runtime.images import rgb_image

LANCZOS = Image.Resampling.LANCZOS
STRETCH, CROP, FILL = 0, 1, 2  # the original's resize modes
MODES = ("Just resize", "Crop and resize", "Resize and fill")
# Blurs of what is kept, the widest first, each laid over those before it so many times.
LAYERS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
Size = tuple[int, int]
Box = tuple[int, int, int, int]
Finish = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, slots=True)
class Inpainting:
    """How a mask is used.

    blur: (across, down) standard deviations in pixels; invert: make new where the mask is dark
    cropped: the masked region alone is made, at the whole size, and put back; padding: pixels that
        it is larger by on each side
    filled: the masked region begins as a blur of its surroundings
    """

    blur: tuple[float, float]
    invert: bool
    cropped: bool
    padding: int
    filled: bool

    @property
    def settings(self) -> dict[str, str]:
        """As the original writes them into an image's text."""
        area = {"Inpaint area": "Only masked", "Masked area padding": str(self.padding)}
        return {
            "Mask blur": "x".join(f"{each:g}" for each in dict.fromkeys(self.blur)),
            "Mask mode": "Inpaint not masked" if self.invert else "Inpaint masked",
            "Masked content": "fill" if self.filled else "original",
            **(area if self.cropped else {"Inpaint area": "Whole picture"}),
        }


@dataclass(frozen=True, slots=True)
class Given:
    """image, mask: for the model; finish: what becomes of each image that it makes
    settings: what the image's text says of all this, under the original's names
    """

    image: Image.Image
    mask: Image.Image | None
    finish: Finish
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return {"image": self.image, "mask_image": self.mask}


def given_from(
    image: Image.Image, mask: Image.Image | None, size: Size, mode: int, how: Inpainting
) -> Given:
    """An image and its mask for the model, and how its result is laid over the image."""
    whole = rgb_image(image)
    given = _given_from(whole, mask, size, mode, how)
    stretched = mode == STRETCH or whole.width * size[1] == whole.height * size[0]
    settings = {} if stretched else {"Resize mode": MODES[mode]}
    if given.mask is not None:
        settings |= how.settings
    return replace(given, settings=settings)


def _given_from(
    whole: Image.Image, mask: Image.Image | None, size: Size, mode: int, how: Inpainting
) -> Given:
    light = None if mask is None else blurred(binary_mask(mask, how.invert), how.blur)
    box = light.getbbox() if light is not None and how.cropped else None
    if light is None or (how.cropped and box is None):
        return Given(resized(whole, size, mode), None, lambda made: made)
    if box is not None:
        return _cropped(whole, light.resize(whole.size, Image.Resampling.NEAREST), size, how)
    whole, light = resized(whole, size, mode), resized(light, size, mode)
    overlay = light.point(lambda value: min(255, 2 * value))
    start = filled(whole, light) if how.filled else whole
    return Given(start, light, lambda made: Image.composite(made, whole, overlay))


def _cropped(whole: Image.Image, light: Image.Image, size: Size, how: Inpainting) -> Given:
    box = region(light, how.padding, size)
    part, mask = resized(whole.crop(box), size, FILL), resized(light.crop(box), size, FILL)

    def finish(made: Image.Image) -> Image.Image:
        laid = whole.copy()
        laid.paste(resized(made, (box[2] - box[0], box[3] - box[1]), CROP), box[:2])
        return Image.composite(laid, whole, light)

    return Given(filled(part, mask) if how.filled else part, mask, finish)


def binary_mask(mask: Image.Image, invert: bool) -> Image.Image:
    """A mask in shades of grey: its alpha where it has one that says anything, as canvases export
    them, else how light it is.
    """
    mask = ImageOps.exif_transpose(mask)
    light = mask.convert("L")
    if "A" in mask.getbands() or "transparency" in mask.info:
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            light = alpha.point(lambda value: 255 if value > 128 else 0)
    return ImageOps.invert(light) if invert else light


def blurred(mask: Image.Image, blur: tuple[float, float]) -> Image.Image:
    """A Gaussian blur that ends at two and a half deviations, mirrored at the edges."""
    values = np.asarray(mask, np.float32)
    for axis, deviation in zip((1, 0), blur, strict=True):
        if deviation > 0:
            values = np.rint(_convolved(values, deviation, axis))
    return Image.fromarray(values.astype(np.uint8))


def _convolved(values: np.ndarray, deviation: float, axis: int) -> np.ndarray:
    radius = int(2.5 * deviation + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    around = [(radius, radius) if each == axis else (0, 0) for each in (0, 1)]
    padded, count = np.pad(values, around, mode="reflect"), values.shape[axis]
    total = np.zeros_like(values)
    for i, weight in enumerate(weights / weights.sum()):
        total += np.float32(weight) * padded.take(range(i, i + count), axis)
    return total


def region(mask: Image.Image, padding: int, size: Size) -> Box:
    """The box of what is light, padded and then grown to the shape of `size` within the image."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    ratio = size[0] / size[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grown(top, bottom, int((right - left) / ratio), mask.height)
    else:
        left, right = _grown(left, right, int((bottom - top) * ratio), mask.width)
    return left, top, right, bottom


def _grown(low: int, high: int, wanted: int, most: int) -> tuple[int, int]:
    """Both ends moved apart to a wanted length, and back within 0 to `most`."""
    low -= max(wanted - (high - low), 0) // 2
    high = max(low + wanted, high)
    low, high = low - max(high - most, 0), high - max(high - most, 0)
    return max(low, 0), min(high - min(low, 0), most)


def resized(image: Image.Image, size: Size, mode: int) -> Image.Image:
    """Resized (Lanczos): stretched, cropped to fill the size, or within it with its edges drawn
    out to the sides.
    """
    if mode == STRETCH or image.width * size[1] == image.height * size[0]:
        return image.resize(size, LANCZOS)
    wide = size[0] * image.height > size[1] * image.width  # the size is wider than the image
    if wide == (mode == CROP):
        inner = size[0], max(1, image.height * size[0] // image.width)
    else:
        inner = max(1, image.width * size[1] // image.height), size[1]
    scaled = image.resize(inner, LANCZOS)
    left, top = size[0] // 2 - inner[0] // 2, size[1] // 2 - inner[1] // 2
    if mode == CROP:
        return scaled.crop((-left, -top, size[0] - left, size[1] - top))
    sides = [(top, size[1] - inner[1] - top), (left, size[0] - inner[0] - left)]
    pixels = np.asarray(scaled)
    return Image.fromarray(np.pad(pixels, [*sides, (0, 0)][: pixels.ndim], mode="edge"))


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with what is masked drawn from blurs of the rest, ever less of them."""
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    laid = Image.new("RGBA", image.size)
    for radius, times in LAYERS:
        layer = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            laid.alpha_composite(layer)
    return laid.convert("RGB")
