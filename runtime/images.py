"""Images in and out: the decoder's output, arrays, and files with their settings as text.

Knows Pillow and file formats; not how an image is generated.
"""

import errno
import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from sdrt.atomic_files import NO_SPACE, write_atomic, write_numbered
from sdrt.errors import StorageError, UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_SIDE = 8192
SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".png": "PNG"}
QUALITY = 95  # of JPEG and WebP files
# No alternative reads past the next comma or quote, so matching takes linear time.
SETTING = re.compile(r'([^,:"]++):\s*+("(?:\\.|[^"\\])*+"(?=,|$)|[^,]*+)|[^,]++|,')
EXIF, USER_COMMENT = 0x8769, 0x9286
CONVERTED = {"La": "LA", "LAB": "RGB"}  # modes that Pillow converts to few others
COMPRESSION = 4  # of PNG: files as small as with 6 and 9, in half the time
# Pillow decodes an opened image when it is first used, which fails if two threads share it.
_DECODING = threading.Lock()
MAX_COMMENT = 60_000  # bytes; JPEG has room for 65,533 of EXIF


def images_from_decoded(decoded: np.ndarray) -> list[Image.Image]:
    """RGB images of the decoder's output [B, 3, H, W], about [-1, 1], rounded to bytes."""
    # Merged by Pillow, which is several times faster than a transpose.
    return [Image.merge("RGB", [_to_band(band) for band in pixels]) for pixels in decoded]


def _to_band(numbers: np.ndarray) -> Image.Image:
    """One colour, [H, W], which stays in the processor's cache throughout."""
    unit = numbers * np.float32(0.5)
    # In place: allocating costs as much as the arithmetic.
    unit += np.float32(0.5)
    np.clip(unit, 0.0, 1.0, out=unit)
    unit *= np.float32(255.0)
    return Image.fromarray(np.rint(unit, out=unit).astype(np.uint8))


def pixels_from_latents(latents: np.ndarray) -> np.ndarray:
    """The result of a model without a decoder, [B, 3 or 1, H, W], as [B, 3, H, W] float32."""
    return np.repeat(latents, 3 // latents.shape[1], axis=1).astype(np.float32)


def open_image(path: Path) -> Image.Image:
    """Open an image file without decoding it; raises UsageError for other files and large sides."""
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise UsageError(f"failed to read {str(path)[:60]}: {error.strerror}") from error
    if not exists:
        raise UsageError(f"{path} does not exist")
    try:
        if not path.is_file():
            raise ValueError("not a file")
        image = Image.open(path, formats=FORMATS)
    except Exception as error:  # decoders fail in many ways on untrusted bytes
        raise UsageError(f"{path} is not a readable {', '.join(FORMATS)} image") from error
    _check_sides(image)
    return image


def image_from_bytes(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file's bytes.

    Args:
        data: The file.
        max_pixels: Checked before anything is decoded.

    Raises:
        UsageError: For what is not an image, is damaged or too large.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        _check_sides(image)
        if image.width * image.height <= max_pixels:
            image.load()
            return image
    except UsageError:
        raise
    except Exception as error:  # decoders fail in many ways on untrusted bytes
        names = ", ".join(FORMATS)
        raise UsageError(f"not a readable {names} image: {type(error).__name__}") from error
    raise UsageError(
        f"the image is {image.width}x{image.height}; expected at most {max_pixels} pixels"
    )


def _check_sides(image: Image.Image) -> None:
    """Raise UsageError for a side that is too long, before the image is decoded."""
    if not all(1 <= side <= MAX_SIDE for side in image.size):
        raise UsageError(
            f"the image is {image.size[0]}x{image.size[1]}; expected sides of at most {MAX_SIDE}"
        )


def image_to_array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """An image for the encoder: upright, over white where it is transparent, resized (Lanczos).

    Args:
        image: In any mode.
        size: (width, height).

    Returns:
        [1, 3, H, W] float32 in [-1, 1].
    """
    pixels = np.asarray(convert_to_rgb(image).resize(size, Image.Resampling.LANCZOS), np.float32)
    return pixels.transpose(2, 0, 1)[None] / np.float32(127.5) - np.float32(1.0)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """An image upright and in RGB, over white where it is transparent; raises UsageError for a
    damaged one.
    """
    colour = _decode(image)
    if "A" in colour.getbands() or "transparency" in colour.info:
        layered = colour.convert("RGBA")
        colour = Image.new("RGBA", layered.size, "white")
        colour.alpha_composite(layered)
    return colour.convert("RGB")


def mask_to_array(mask: Image.Image, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A mask for latents: 1 where it is light, which is the area to replace.

    Args:
        mask: Of values up to 255, or of 0 and 1 only.
        image: The image that it masks.
        size: (width, height) of the result.

    Returns:
        [1, 1, H, W] float32 of 0 and 1.

    Raises:
        UsageError: For a mask of another size than the image, and for an alpha channel that masks
            something else than the brightness.
    """
    upright, masked = _decode(mask), _apply_orientation(image)
    if upright.size != masked.size:
        raise UsageError(
            f"the mask is {upright.size[0]}x{upright.size[1]}, the image "
            f"{masked.size[0]}x{masked.size[1]}",
            hint="pass a mask of the image's size",
        )
    light = _to_grey_mask(upright)
    threshold = 1 if light.getextrema()[1] == 1 else 128
    values = np.asarray(light.resize(size, Image.Resampling.NEAREST))
    return (values >= threshold).astype(np.float32)[None, None]


def _to_grey_mask(mask: Image.Image) -> Image.Image:
    """A mask in shades of grey, dark where it is transparent; raises UsageError where its alpha
    masks something else, so that it is not clear which of the two is meant.
    """
    if "A" not in mask.getbands() and "transparency" not in mask.info:
        return mask.convert("L")
    alpha = mask.convert("RGBA").getchannel("A")
    light = Image.composite(mask.convert("RGBA").convert("L"), Image.new("L", mask.size), alpha)
    differs = (np.asarray(light) >= 128) != (np.asarray(alpha) >= 128)
    if alpha.getextrema() != (255, 255) and differs.any():
        raise UsageError(
            "the mask's alpha channel and its brightness mask different areas",
            hint="pass a mask without transparency that is white in the area to replace",
        )
    return light


def depth_to_array(depth: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A depth map for latents, rescaled to [-1, 1].

    Args:
        depth: In any mode; near is light.
        size: (width, height) of the result.

    Returns:
        [1, H, W] float32.

    Raises:
        UsageError: For a map of one depth.
    """
    depth = _apply_orientation(depth)
    plain = depth if depth.mode in ("L", "F", "I", "I;16") else depth.convert("L")
    floats = Image.fromarray(np.asarray(plain, np.float32))
    values = np.asarray(floats.resize(size, Image.Resampling.BICUBIC), np.float32)
    low, high = float(values.min()), float(values.max())
    if high <= low:
        raise UsageError("the depth map has one depth everywhere; expected different depths")
    return (2.0 * (values - low) / (high - low) - 1.0)[None].astype(np.float32)


def _decode(image: Image.Image) -> Image.Image:
    """Upright, with 8 bits per channel; raises UsageError for a damaged file."""
    upright = _apply_orientation(image)
    if upright.mode.startswith("I"):  # 16 bits
        deep = np.clip(np.asarray(upright, np.float64) / 257.0, 0.0, 255.0)
        return Image.fromarray(deep.round().astype(np.uint8))
    through = CONVERTED.get(upright.mode)
    return upright.convert(through) if through else upright


def _apply_orientation(image: Image.Image) -> Image.Image:
    _check_sides(image)
    try:
        with _DECODING:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged images and their EXIF fail in many ways
        raise UsageError(f"failed to decode the image: {error}") from error


def make_grid(
    images: Sequence[Image.Image], columns: int | None = None, background: str = "black"
) -> Image.Image:
    """Paste images of one size into rows of `columns`; by default the grid is nearly square."""
    if not images:
        raise UsageError("a grid of no images; expected at least one")
    wide = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (wide * width, math.ceil(len(images) / wide) * height), background)
    for i, image in enumerate(images):
        grid.paste(image, (i % wide * width, i // wide * height))
    return grid


def make_labelled_grid(
    images: Sequence[Image.Image], labels: Sequence[str], columns: int | None = None
) -> Image.Image:
    """A grid of images, each above its label; small ones are enlarged."""
    scale = max(1, math.ceil(128 / min(images[0].size)))
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default(12)
    tall = 16 * max(label.count("\n") + 1 for label in labels) + 6
    tiles = []
    for image, label in zip(images, labels, strict=True):
        tile = Image.new("RGB", (width + 8, height + tall + 8), "white")
        tile.paste(image.resize((width, height), Image.Resampling.NEAREST), (4, 4))
        ImageDraw.Draw(tile).text((5, height + 6), label, "black", font)
        tiles.append(tile)
    return make_grid(tiles, columns, "white")


def format_parameters(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """The `parameters` text of an image: prompt, negative prompt, then `Key: value, ...`.

    AUTOMATIC1111's web UI writes and reads the same. Prompts that `parse_parameters` would not
    separate again are repeated as settings.
    """
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    last = ", ".join(f"{key}: {quote(str(value))}" for key, value in settings.items())
    text = "\n".join([*lines, last])
    parsed = parse_parameters(text)
    for key, value in (("Prompt", prompt), ("Negative prompt", negative_prompt)):
        if parsed[key] != value.strip():
            text += f", {key}: {json.dumps(value, ensure_ascii=False)}"
    return text


def quote(value: object) -> str:
    """A setting's value, in quotes where it could not be parsed otherwise."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def unquote(value: str) -> str:
    """The opposite of `quote`."""
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def parse_parameters(parameters: str) -> dict[str, str]:
    """Parse a `parameters` text: `Prompt`, `Negative prompt` and every `Key: value`."""
    *lines, last = parameters.strip().split("\n")
    settings = {key.strip(): value for key, value in SETTING.findall(last) if key.strip()}
    if "Steps" not in settings:
        lines, settings = [*lines, last], {}
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt:")
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **settings}


def image_to_bytes(
    image: Image.Image, parameters: str, kind: str = "PNG", quality: int = 100
) -> bytes:
    """Encode an image file with its `parameters` text: in PNG as text, else as EXIF comment.

    Args:
        image: RGB.
        parameters: From `format_parameters`.
        kind: PNG, JPEG or WEBP.
        quality: 0 to 100, of JPEG and WEBP.
    """
    buffer = BytesIO()
    options = {"compress_level": COMPRESSION} if kind == "PNG" else {"quality": quality}
    image.save(buffer, kind, **options, **metadata_options(parameters, kind))
    return buffer.getvalue()


def metadata_options(parameters: str, kind: str) -> dict[str, Any]:
    """The arguments of Pillow's `save` that write a `parameters` text into a PNG, JPEG or WebP
    file; none for files of another kind.
    """
    if kind == "PNG":
        info = PngInfo()
        if parameters:
            (info.add_text if parameters.isascii() else info.add_itxt)("parameters", parameters)
        return {"pnginfo": info}
    if kind not in SUFFIXES.values():
        return {}
    exif = Image.Exif()
    comment = parameters.encode("utf-16-be")[:MAX_COMMENT]
    exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + comment
    return {"exif": exif}


def read_parameters(image: Image.Image) -> str:
    """The `parameters` text of an image file; empty if it has none."""
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    try:
        comment = image.getexif().get_ifd(EXIF).get(USER_COMMENT, b"")
    except Exception:  # untrusted EXIF fails in many ways
        return ""
    if not isinstance(comment, bytes):
        return str(comment)
    wide = comment.startswith(b"UNICODE")
    return comment[8:].decode("utf-16-be" if wide else "utf-8", "replace")


def save_image(image: Image.Image, path: Path, parameters: str, replace: bool = True) -> Path:
    """Write an image file with its `parameters` text, atomically.

    Args:
        image: RGB.
        path: Of the file; its suffix chooses JPEG or WebP, anything else is PNG.
        parameters: From `format_parameters`.
        replace: Whether to replace a file of this name; else a number is added to the name.

    Returns:
        The path of the file.

    Raises:
        UsageError: The path cannot be written.
        StorageError: The disk is full or fails.
    """
    content = image_to_bytes(image, parameters, SUFFIXES.get(path.suffix.lower(), "PNG"), QUALITY)
    try:
        if not replace:
            return write_numbered(path, content)
        write_atomic(path, content)
    except OSError as error:
        failed = error.errno in (*NO_SPACE, errno.EIO, errno.EROFS)
        kind = StorageError if failed else UsageError
        hint = "free some space, or pass another --output" if error.errno in NO_SPACE else None
        raise kind(f"failed to write {path}: {error.strerror or error}", hint=hint) from error
    return path
