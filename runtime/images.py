"""Pictures at the edge: from the decoder's numbers to files that users' tools read, and back."""

import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from sdrt.atomic_files import write_new, write_whole
from sdrt.errors import UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_SIDE = 8192
# No try reads past the next comma or quote: a text takes no longer than it is.
SETTING = re.compile(r'([^,:"]++):\s*+("(?:\\.|[^"\\])*+"(?=,|$)|[^,]*+)|[^,]++|,')
EXIF, USER_COMMENT = 0x8769, 0x9286
CONVERTED = {"La": "LA", "LAB": "RGB"}  # modes from which Pillow reaches few others directly
COMPRESSION = 4  # of PNG: of a photograph as small as 6 and 9, in half their time
# Pillow decodes an opened image when it is first used, which goes wrong where two threads share it.
_DECODING = threading.Lock()
MAX_COMMENT = 60_000  # bytes; JPEG has room for 65,533 of EXIF


def images_from_decoded(decoded: np.ndarray) -> list[Image.Image]:
    """[B, 3, H, W] about [-1, 1] -> one RGB picture each, rounded to bytes."""
    # Merged by Pillow, which is several times faster than a transpose.
    return [Image.merge("RGB", [_band(band) for band in picture]) for picture in decoded]


def _band(numbers: np.ndarray) -> Image.Image:
    """One colour, [H, W], which stays in the processor's cache from the first step to the last."""
    unit = numbers * np.float32(0.5)
    # In place: new memory costs as much as the arithmetic.
    unit += np.float32(0.5)
    np.clip(unit, 0.0, 1.0, out=unit)
    unit *= np.float32(255.0)
    return Image.fromarray(np.rint(unit, out=unit).astype(np.uint8))


def pixels_of(drawn: np.ndarray) -> np.ndarray:
    """What a model of pixels leaves, [B, 3 or 1, H, W], as [B, 3, H, W] float32: grey is three
    alike.
    """
    return np.repeat(drawn, 3 // drawn.shape[1], axis=1).astype(np.float32)


def open_image(path: Path) -> Image.Image:
    """A picture from a file, not yet decoded; raises UsageError if it is none or far too large."""
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise UsageError(f"{str(path)[:60]} cannot be read: {error.strerror}") from error
    if not exists:
        raise UsageError(f"{path} does not exist")
    try:
        if not path.is_file():
            raise ValueError("no file")
        image = Image.open(path, formats=FORMATS)
    except Exception as error:  # decoders of strangers' bytes fail in many ways
        raise UsageError(f"{path} is not a readable {', '.join(FORMATS)} picture") from error
    _bounded(image)
    return image


def image_from_bytes(data: bytes, most_pixels: int) -> Image.Image:
    """A picture from a file's bytes, decoded; raises UsageError if it is none, is damaged or has
    more pixels, which is known before it is decoded.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        _bounded(image)
        if image.width * image.height <= most_pixels:
            image.load()
            return image
    except UsageError:
        raise
    except Exception as error:  # decoders of strangers' bytes fail in many ways
        names = ", ".join(FORMATS)
        raise UsageError(f"not a readable {names} picture: {type(error).__name__}") from error
    raise UsageError(f"a picture of {image.width}x{image.height}; at most {most_pixels} pixels")


def _bounded(image: Image.Image) -> None:
    """Before a picture is decoded: its sides must be sane."""
    if not all(1 <= side <= MAX_SIDE for side in image.size):
        raise UsageError(
            f"a picture of {image.size[0]}x{image.size[1]}; at most {MAX_SIDE} a side are read"
        )


def image_array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture for the encoder, [1, 3, H, W] float32 in [-1, 1]: upright, over white where it is
    see-through, resized (Lanczos) to (width, height).
    """
    pixels = np.asarray(rgb_image(image).resize(size, Image.Resampling.LANCZOS), np.float32)
    return pixels.transpose(2, 0, 1)[None] / np.float32(127.5) - np.float32(1.0)


def rgb_image(image: Image.Image) -> Image.Image:
    """An image upright and in RGB, over white where it is transparent; raises UsageError for a
    damaged one.
    """
    colour = _decoded(image)
    if "A" in colour.getbands() or "transparency" in colour.info:
        layered = colour.convert("RGBA")
        colour = Image.new("RGBA", layered.size, "white")
        colour.alpha_composite(layered)
    return colour.convert("RGB")


def mask_array(mask: Image.Image, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A mask for latents, [1, 1, H, W] float32 of 0 (keep) and 1 (make new, where it is light). One
    of nothing but 0 and 1 is light where it is 1.

    Raises UsageError when its size is not the picture's, and for an alpha channel that masks
    something else.
    """
    upright, below = _decoded(mask), _upright(image)
    if upright.size != below.size:
        raise UsageError(
            f"the mask is {upright.size[0]}x{upright.size[1]}, the picture "
            f"{below.size[0]}x{below.size[1]}; give a mask of the picture's size"
        )
    light = _light(upright)
    threshold = 1 if light.getextrema()[1] == 1 else 128
    values = np.asarray(light.resize(size, Image.Resampling.NEAREST))
    return (values >= threshold).astype(np.float32)[None, None]


def _light(mask: Image.Image) -> Image.Image:
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
            "the mask's alpha channel and its brightness mask different areas; give a mask without "
            "transparency that is white where the image is made new"
        )
    return light


def depth_array(depth: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A depth map for latents, [1, H, W] float32, its range stretched to [-1, 1]."""
    depth = _upright(depth)
    plain = depth if depth.mode in ("L", "F", "I", "I;16") else depth.convert("L")
    floats = Image.fromarray(np.asarray(plain, np.float32))
    values = np.asarray(floats.resize(size, Image.Resampling.BICUBIC), np.float32)
    low, high = float(values.min()), float(values.max())
    if high <= low:
        raise UsageError("the depth map is of one depth; nothing can be told from it")
    return (2.0 * (values - low) / (high - low) - 1.0)[None].astype(np.float32)


def _decoded(image: Image.Image) -> Image.Image:
    """Upright, with 8 bits a channel; raises UsageError for a file that ends too soon."""
    upright = _upright(image)
    if upright.mode.startswith("I"):  # 16 bits
        deep = np.clip(np.asarray(upright, np.float64) / 257.0, 0.0, 255.0)
        return Image.fromarray(deep.round().astype(np.uint8))
    through = CONVERTED.get(upright.mode)
    return upright.convert(through) if through else upright


def _upright(image: Image.Image) -> Image.Image:
    _bounded(image)
    try:
        with _DECODING:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # as damaged pictures fail in many ways, so does what is in them
        raise UsageError(f"the picture cannot be decoded: {error}") from error


def image_grid(
    images: Sequence[Image.Image], columns: int | None = None, ground: str = "black"
) -> Image.Image:
    """All pictures, of one size, in rows of `columns` (default: as square as possible)."""
    if not images:
        raise UsageError("a grid of no pictures; give at least one")
    wide = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (wide * width, math.ceil(len(images) / wide) * height), ground)
    for i, image in enumerate(images):
        grid.paste(image, (i % wide * width, i // wide * height))
    return grid


def labelled_sheet(
    images: Sequence[Image.Image], labels: Sequence[str], columns: int | None = None
) -> Image.Image:
    """All pictures in a grid, each over its label; small ones are drawn larger."""
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
    return image_grid(tiles, columns, "white")


def parameters_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """The text that users' tools read back: prompt, negative prompt, then `Key: value, ...`.

    Prompts that cannot be told apart so, for what they hold themselves, come again as settings.
    """
    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    last = ", ".join(f"{key}: {quoted(str(value))}" for key, value in settings.items())
    text = "\n".join([*lines, last])
    found = settings_from_text(text)
    for key, value in (("Prompt", prompt), ("Negative prompt", negative_prompt)):
        if found[key] != value.strip():
            text += f", {key}: {json.dumps(value, ensure_ascii=False)}"
    return text


def quoted(value: object) -> str:
    """A setting's value, in quotes where the text could not be taken apart otherwise."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def unquoted(value: str) -> str:
    """The opposite of `quoted`."""
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def settings_from_text(parameters: str) -> dict[str, str]:
    """The `parameters` text taken apart: `Prompt`, `Negative prompt` and every `Key: value`."""
    *lines, last = parameters.strip().split("\n")
    settings = {key.strip(): value for key, value in SETTING.findall(last) if key.strip()}
    if "Steps" not in settings:
        lines, settings = [*lines, last], {}
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt:")
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **settings}


def encoded(image: Image.Image, parameters: str, kind: str = "PNG", quality: int = 100) -> bytes:
    """A file of a picture with its `parameters` text, in PNG as text, else as EXIF comment.

    kind: PNG, JPEG or WEBP; quality: 0 to 100, of the last two.
    """
    buffer = BytesIO()
    if kind == "PNG":
        info = PngInfo()
        if parameters:
            (info.add_text if parameters.isascii() else info.add_itxt)("parameters", parameters)
        image.save(buffer, kind, pnginfo=info, compress_level=COMPRESSION)
    else:
        exif = Image.Exif()
        comment = parameters.encode("utf-16-be")[:MAX_COMMENT]
        exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + comment
        image.save(buffer, kind, quality=quality, exif=exif)
    return buffer.getvalue()


def text_of(image: Image.Image) -> str:
    """The `parameters` text of a picture's file; empty if it has none."""
    text = image.info.get("parameters")
    if isinstance(text, str):
        return text
    try:
        comment = image.getexif().get_ifd(EXIF).get(USER_COMMENT, b"")
    except Exception:  # a stranger's, damaged in one of many ways
        return ""
    if not isinstance(comment, bytes):
        return str(comment)
    wide = comment.startswith(b"UNICODE")
    return comment[8:].decode("utf-16-be" if wide else "utf-8", "replace")


def save_png(image: Image.Image, path: Path, parameters: str, replace: bool = True) -> Path:
    """Write a PNG with its `parameters` text; the file appears whole or not at all.

    replace: whether a file of this name is replaced; if not, a number is added to the name
    Returns the path of the file.
    """
    content = encoded(image, parameters)
    try:
        if not replace:
            return write_new(path, content)
        write_whole(path, content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    return path
