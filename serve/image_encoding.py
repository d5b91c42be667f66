"""Image encoding: untrusted base64 in, base64 in the requested format out, masks and previews."""

import base64
import binascii
import re

from PIL import Image

from sdrt.errors import UsageError
from sdrt.runtime.images import image_from_bytes, image_to_bytes

MAX_PIXELS = 4096 * 4096
PREVIEW_SIDE = 256
DATA_URL = re.compile(r"data:[\w.+/-]{0,40}(?:;[\w.+=-]{1,40}){0,3};base64,", re.IGNORECASE)
SPACE = re.compile(r"\s+")
URL_SAFE_TO_STANDARD = str.maketrans("-_", "+/")


def decode_base64_image(text: str) -> Image.Image:
    """Decode an image from base64 or a data URL; raises UsageError if it is invalid.

    Accepts what clients send: whitespace, the URL-safe alphabet, missing padding.
    """
    text = SPACE.sub("", text)
    if text[:5].lower() in ("http:", "https"):
        raise UsageError("image URLs are not fetched; send the image as base64")
    if prefix := DATA_URL.match(text):
        text = text[prefix.end() :]
    text = text.rstrip("=").translate(URL_SAFE_TO_STANDARD)
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError("the image is not valid base64") from error
    return image_from_bytes(data, MAX_PIXELS)


def encode_base64_image(
    image: Image.Image, parameters: str = "", image_format: str = "PNG", quality: int = 100
) -> str:
    return base64.b64encode(image_to_bytes(image, parameters, image_format, quality)).decode(
        "ascii"
    )


def mask_from_alpha(mask: Image.Image) -> Image.Image:
    """A white-on-black mask from OpenAI's kind, which is transparent in the area to repaint; raises
    UsageError if nothing is transparent.
    """
    alpha = mask.convert("RGBA").getchannel("A")  # 255 where a file has none
    if not alpha.histogram()[0]:
        raise UsageError(
            "the mask has no transparent pixels",
            hint="make the area to repaint fully transparent",
        )
    return alpha.point(lambda value: 255 if value == 0 else 0)


def enlarge_preview(preview: Image.Image) -> Image.Image:
    """Upscale a preview of one pixel per latent to a viewable size."""
    scale = max(1, PREVIEW_SIDE // max(preview.size))
    size = (preview.width * scale, preview.height * scale)
    return preview.resize(size, Image.Resampling.BICUBIC)
