"""Pictures on their way in and out: base64, files that may lie, formats that clients ask for."""

import base64
import binascii
import re

from PIL import Image

from sdrt.errors import UsageError
from sdrt.runtime.images import encoded, image_from_bytes

MAX_PIXELS = 4096 * 4096
PREVIEW_SIDE = 256
DATA_URL = re.compile(r"data:[\w.+/-]{0,40}(?:;[\w.+=-]{1,40}){0,3};base64,", re.IGNORECASE)
SPACE = re.compile(r"\s+")
FROM_URL_ALPHABET = str.maketrans("-_", "+/")


def image_from_base64(text: str) -> Image.Image:
    """A decoded image of base64, or of a data URL; raises UsageError if it is none.

    As lenient as clients need: line ends and spaces, the alphabet for URLs, no padding.
    """
    text = SPACE.sub("", text)
    if text[:5].lower() in ("http:", "https"):
        raise UsageError("an image's address is not fetched; send the image itself in base64")
    if head := DATA_URL.match(text):
        text = text[head.end() :]
    text = text.rstrip("=").translate(FROM_URL_ALPHABET)
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError("an image that is not base64") from error
    return image_from_bytes(data, MAX_PIXELS)


def base64_from_image(
    image: Image.Image, parameters: str = "", kind: str = "PNG", quality: int = 100
) -> str:
    return base64.b64encode(encoded(image, parameters, kind, quality)).decode("ascii")


def mask_from_alpha(mask: Image.Image) -> Image.Image:
    """Light where a mask as OpenAI defines it is transparent; raises UsageError if nothing is."""
    alpha = mask.convert("RGBA").getchannel("A")  # 255 where a file has none
    if not alpha.histogram()[0]:
        raise UsageError(
            "the mask has no transparency; make fully transparent what is to be made new"
        )
    return alpha.point(lambda value: 255 if value == 0 else 0)


def enlarged(preview: Image.Image) -> Image.Image:
    """A preview of a pixel a latent, drawn large enough to be looked at."""
    scale = max(1, PREVIEW_SIDE // max(preview.size))
    size = (preview.width * scale, preview.height * scale)
    return preview.resize(size, Image.Resampling.BICUBIC)
