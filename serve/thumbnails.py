"""Thumbnails of LoRA and embedding files: images that lie next to them, as in A1111.

Knows files; whether a name is one of the folder's is the caller's business.
"""

import io
from pathlib import Path

from PIL import Image

from sdrt.errors import UsageError
from sdrt.runtime.images import convert_to_rgb, image_from_bytes

from .image_encoding import MAX_PIXELS

# A1111's names, in its order: `NAME.png`, then `NAME.preview.png`.
SUFFIXES = tuple(
    f"{part}.{kind}" for kind in ("png", "jpg", "jpeg", "webp") for part in ("", ".preview")
)
MAX_FILE_BYTES = 16 * 2**20
THUMBNAIL_SIDE = 192


def find_thumbnail(file: Path, folder: Path) -> Path | None:
    """The image of a file, if it lies in the folder and no link leads out of it."""
    inside = folder.resolve()
    for suffix in SUFFIXES:
        path = file.with_name(file.stem + suffix)
        if path.is_file() and path.resolve().is_relative_to(inside):
            return path
    return None


def read_thumbnail(path: Path) -> bytes:
    """A small JPEG of an image file.

    Raises:
        UsageError: The file cannot be read, is too large or is not an image.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path.name} exceeds {MAX_FILE_BYTES} bytes")
        image = convert_to_rgb(image_from_bytes(path.read_bytes(), MAX_PIXELS))
    except OSError as error:
        raise UsageError(f"cannot read {path.name}: {error.strerror}") from error
    return encode_thumbnail(image)


def encode_thumbnail(image: Image.Image) -> bytes:
    """An RGB image as a small JPEG."""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=85)
    return target.getvalue()
