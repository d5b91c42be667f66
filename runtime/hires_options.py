"""The options of a second pass at a higher resolution ("hires fix"), with A1111's meanings.

Knows their values; not models.
"""

from collections.abc import Mapping
from typing import Any

from sdrt.errors import UsageError

from .images import MAX_SIDE
from .parsing import (
    Parser,
    float_parser,
    int_parser,
    parse_text,
    parse_texts,
    sequence_parser,
)

MAX_HIRES_SCALE = 8.0
MAX_HIRES_STEPS = 1000
DEFAULT_UPSCALER = "Latent"
# A1111's names of the settings in an image's text.
HIRES_SIZE_IN_TEXT = ("Hires upscale", "Hires resize")
_SIDES = sequence_parser(
    int_parser(0, MAX_SIDE), '"WIDTHxHEIGHT" or (width, height), one of which may be 0', length=2
)


def parse_hires_size(name: str, value: object) -> tuple[int, int]:
    """(width, height); a side of 0 follows from the other."""
    if isinstance(value, str):
        value = [int(side) if side.isdecimal() else side for side in value.lower().split("x")]
    width, height = _SIDES(name, value)
    if not width and not height:
        raise UsageError(f"{name} is 0x0", hint="pass at least one side")
    return width, height


HIRES_PARSERS: dict[str, Parser[Any]] = {
    "hires_scale": float_parser(1.0, MAX_HIRES_SCALE),
    "hires_size": parse_hires_size,
    "hires_steps": int_parser(0, MAX_HIRES_STEPS),
    "hires_strength": float_parser(1e-3, 1.0, "a number above 0 and at most 1"),
    "hires_upscaler": parse_text,
    "hires_scheduler": parse_text,
    "hires_prompt": parse_texts,
    "hires_negative_prompt": parse_texts,
    "hires_guidance_scale": float_parser(0.0, 100.0),
}


def check_hires(options: Any, defaults: Mapping[str, Any]) -> None:
    """Raise UsageError for `GenerationOptions` of a second pass that do not go together."""
    if options.hires_scale is None and options.hires_size is None:
        for name in HIRES_PARSERS:
            if getattr(options, name) != defaults[name]:
                raise UsageError(
                    f"{name} requires hires_scale or hires_size", hint="pass for example 2.0"
                )
        return
    if options.hires_scale is not None and options.hires_size is not None:
        raise UsageError("both hires_scale and hires_size", hint="pass one of them")
    for name in ("image", "image_latents", "timesteps", "sigmas", "denoising_end"):
        if getattr(options, name) is not None:
            raise UsageError(
                f"{name} with a hires pass, which is for runs from noise with a sampler's own grid",
                hint="leave out one of them",
            )
    if getattr(options, "control_image", None) is not None:
        raise UsageError(
            "control_image with a hires pass is unsupported: it would steer the first pass alone",
            hint="pass the first image as image=... with the same control_image",
        )
    for name in ("prompt", "negative_prompt"):
        embeds = getattr(options, f"{name}_embeds")
        if getattr(options, f"hires_{name}") is not None and embeds is not None:
            raise UsageError(f"both {name}_embeds and hires_{name}", hint="pass one of them")
