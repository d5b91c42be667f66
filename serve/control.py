"""The control images and the image prompt of a request, as generation options.

Knows bodies and images; what the options mean is decided in `sdrt.runtime`.
"""

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from .image_encoding import decode_base64_image
from .schemas import ControlFields

CONTROL_IMAGES = ("control_image", "ip_adapter_image")


def build_control_options(body: ControlFields) -> dict[str, Any]:
    """The options of a body's control fields; those that are absent are left out.

    Raises:
        UsageError: For an image that cannot be decoded.
    """
    options = {name: getattr(body, name) for name in ControlFields.model_fields}
    for name in CONTROL_IMAGES:
        if options[name] is not None:
            options[name] = decode_images(options[name])
    return {name: value for name, value in options.items() if value is not None}


def decode_images(texts: str | Sequence[str]) -> list[Image]:
    """Images of base64; raises UsageError for one that cannot be decoded."""
    return [decode_base64_image(text) for text in ([texts] if isinstance(texts, str) else texts)]
