"""Inpainting as in A1111: prepares image and mask for the model, and composites its result.

Knows images; no requests and no model. `size` is the (width, height) that the model generates.
Masks are white in the area to repaint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sdrt.runtime.images import convert_to_rgb

LANCZOS = Image.Resampling.LANCZOS
JUST_RESIZE, CROP, FILL = 0, 1, 2  # A1111's resize modes
MODES = ("Just resize", "Crop and resize", "Resize and fill")
# (radius, repetitions) of the blurs of the unmasked area, composited from the widest on.
BLUR_LAYERS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))
Size = tuple[int, int]
Box = tuple[int, int, int, int]
Finish = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, slots=True)
class InpaintingSettings:
    """How a mask is applied.

    Attributes:
        blur: (x, y) standard deviations in pixels.
        invert: Repaint where the mask is black.
        only_masked: Generate the masked region at full size and paste it back.
        padding: Pixels added to the region on each side.
        fill: Fill the masked area with a blur of its surroundings first.
    """

    blur: tuple[float, float]
    invert: bool
    only_masked: bool
    padding: int
    fill: bool

    @property
    def infotext(self) -> dict[str, str]:
        """The infotext entries that A1111 writes."""
        area = {"Inpaint area": "Only masked", "Masked area padding": str(self.padding)}
        return {
            "Mask blur": "x".join(f"{radius:g}" for radius in dict.fromkeys(self.blur)),
            "Mask mode": "Inpaint not masked" if self.invert else "Inpaint masked",
            "Masked content": "fill" if self.fill else "original",
            **(area if self.only_masked else {"Inpaint area": "Whole picture"}),
        }


@dataclass(frozen=True, slots=True)
class PreparedInput:
    """The model's input.

    Attributes:
        image: The input image.
        mask: Its mask.
        finish: Composites a generated image into the original.
        infotext: Infotext entries under A1111's names.
    """

    image: Image.Image
    mask: Image.Image | None
    finish: Finish
    infotext: Mapping[str, object] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return {"image": self.image, "mask_image": self.mask}


def prepare_input(
    image: Image.Image,
    mask: Image.Image | None,
    size: Size,
    mode: int,
    inpainting: InpaintingSettings,
) -> PreparedInput:
    """Prepare an image and its mask for the model.

    Args:
        image: The input image.
        mask: Its mask.
        size: What the model generates.
        mode: A1111's resize mode.
        inpainting: How the mask is applied.
    """
    rgb = convert_to_rgb(image)
    prepared = _prepare(rgb, mask, size, mode, inpainting)
    same_ratio = mode == JUST_RESIZE or rgb.width * size[1] == rgb.height * size[0]
    infotext = {} if same_ratio else {"Resize mode": MODES[mode]}
    if prepared.mask is not None:
        infotext |= inpainting.infotext
    return replace(prepared, infotext=infotext)


def _prepare(
    image: Image.Image,
    mask: Image.Image | None,
    size: Size,
    mode: int,
    inpainting: InpaintingSettings,
) -> PreparedInput:
    soft = (
        None if mask is None else blur_mask(binary_mask(mask, inpainting.invert), inpainting.blur)
    )
    box = soft.getbbox() if soft is not None and inpainting.only_masked else None
    if soft is None or (inpainting.only_masked and box is None):
        return PreparedInput(resize_image(image, size, mode), None, lambda result: result)
    if box is not None:
        soft = soft.resize(image.size, Image.Resampling.NEAREST)
        return _prepare_region(image, soft, size, inpainting)
    resized, soft = resize_image(image, size, mode), resize_image(soft, size, mode)
    overlay = soft.point(lambda value: min(255, 2 * value))
    start = fill_masked(resized, soft) if inpainting.fill else resized
    return PreparedInput(start, soft, lambda result: Image.composite(result, resized, overlay))


def _prepare_region(
    image: Image.Image, soft: Image.Image, size: Size, inpainting: InpaintingSettings
) -> PreparedInput:
    box = masked_region(soft, inpainting.padding, size)
    part, mask = resize_image(image.crop(box), size, FILL), resize_image(soft.crop(box), size, FILL)

    def finish(result: Image.Image) -> Image.Image:
        pasted = image.copy()
        pasted.paste(resize_image(result, (box[2] - box[0], box[3] - box[1]), CROP), box[:2])
        return Image.composite(pasted, image, soft)

    return PreparedInput(fill_masked(part, mask) if inpainting.fill else part, mask, finish)


def binary_mask(mask: Image.Image, invert: bool) -> Image.Image:
    """A mask in grey: its alpha channel if that is not opaque, as canvases export it, else its
    luminance.
    """
    mask = ImageOps.exif_transpose(mask)
    light = mask.convert("L")
    if "A" in mask.getbands() or "transparency" in mask.info:
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            light = alpha.point(lambda value: 255 if value > 128 else 0)
    return ImageOps.invert(light) if invert else light


def blur_mask(mask: Image.Image, blur: tuple[float, float]) -> Image.Image:
    """Gaussian blur, truncated at 2.5 standard deviations and mirrored at the edges."""
    values = np.asarray(mask, np.float32)
    for axis, deviation in zip((1, 0), blur, strict=True):
        if deviation > 0:
            values = np.rint(_convolve(values, deviation, axis))
    return Image.fromarray(values.astype(np.uint8))


def _convolve(values: np.ndarray, deviation: float, axis: int) -> np.ndarray:
    radius = int(2.5 * deviation + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    around = [(radius, radius) if i == axis else (0, 0) for i in (0, 1)]
    padded, count = np.pad(values, around, mode="reflect"), values.shape[axis]
    total = np.zeros_like(values)
    for i, weight in enumerate(weights / weights.sum()):
        total += np.float32(weight) * padded.take(range(i, i + count), axis)
    return total


def masked_region(mask: Image.Image, padding: int, size: Size) -> Box:
    """The bounding box of the mask, padded and grown to the aspect ratio of `size`."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    ratio = size[0] / size[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grow_interval(top, bottom, int((right - left) / ratio), mask.height)
    else:
        left, right = _grow_interval(left, right, int((bottom - top) * ratio), mask.width)
    return left, top, right, bottom


def _grow_interval(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """Grow an interval to `length` around its centre, then move it into 0 to `limit`."""
    low -= max(length - (high - low), 0) // 2
    high = max(low + length, high)
    low, high = low - max(high - limit, 0), high - max(high - limit, 0)
    return max(low, 0), min(high - min(low, 0), limit)


def resize_image(image: Image.Image, size: Size, mode: int) -> Image.Image:
    """Resize (Lanczos) by A1111's mode: distort, crop to fill, or fit and repeat the edges."""
    if mode == JUST_RESIZE or image.width * size[1] == image.height * size[0]:
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


def fill_masked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Fill the masked area with blurs of its surroundings, as A1111 does."""
    unmasked = Image.new("RGBa", image.size)
    unmasked.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    result = Image.new("RGBA", image.size)
    for radius, times in BLUR_LAYERS:
        layer = unmasked.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            result.alpha_composite(layer)
    return result.convert("RGB")
