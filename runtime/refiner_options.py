"""The options of a part of a run and of a refiner, under diffusers' names where it has them.

Knows their values; not models.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdrt.errors import UsageError

from .parsing import Parser, float_parser, invalid_argument, parse_array, to_array

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5  # diffusers' defaults
MAX_AESTHETIC_SCORE = 1000.0
DEFAULT_SWITCH = 0.8
LATENT_CHANNELS = 4  # of models that diffusers hands latents to as an image
_RANGE = float_parser(math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0), "above 0 and below 1")


def parse_image_latents(name: str, value: object) -> np.ndarray:
    """[B, C, H/8, W/8] of finite floats."""
    latents = parse_array(name, value)
    if latents.ndim != 4 or latents.dtype.kind != "f" or not latents.size:
        raise invalid_argument(name, value, "latents [images, C, H/8, W/8] of floats")
    if not np.isfinite(latents).all():
        raise UsageError(f"{name} holds NaN or infinity")
    return latents.astype(np.float32)


def is_latents(value: object) -> bool:
    """Whether what is passed as an image is latents, as diffusers tells them from images."""
    shape: tuple[int, ...] = tuple(getattr(value, "shape", None) or ())
    if len(shape) != 4 or shape[1] != LATENT_CHANNELS:
        return False
    array = to_array(value)
    return array is not None and array.dtype.kind == "f"


SCORES = ("aesthetic_score", "negative_aesthetic_score")
REFINER_PARSERS: dict[str, Parser[Any]] = {
    "denoising_start": _RANGE,
    "denoising_end": _RANGE,
    **dict.fromkeys(SCORES, float_parser(0.0, MAX_AESTHETIC_SCORE)),
    "refiner_switch_at": _RANGE,
}


def check_refiner(options: Any) -> None:
    """Raise UsageError for `GenerationOptions` of a part of a run that do not go together."""
    start, end = options.denoising_start, options.denoising_end
    if start is not None and not options.starts_from_image:
        raise UsageError(
            "denoising_start requires image",
            hint='pass the latents that another call returned with output_type="latent"',
        )
    if start is not None and end is not None and start >= end:
        raise UsageError(
            f"denoising_start {start:g} is not below denoising_end {end:g}",
            hint="a run goes from denoising_start to denoising_end",
        )
    for name in ("strength", "mask_image"):
        if start is not None and getattr(options, name) is not None:
            raise UsageError(
                f"{name} with denoising_start, which decides where the run starts",
                hint="leave one of them out",
            )
    if options.refiner_switch_at is not None:
        _check_ensemble(options)


def _check_ensemble(options: Any) -> None:
    """Raise UsageError for what a run with a refiner cannot have."""
    conflicting: Mapping[str, bool] = {
        name: getattr(options, name) is not None
        for name in (
            *("denoising_start", "denoising_end", "image", "image_latents", "timesteps", "sigmas"),
            *("control_image", "ip_adapter_image", "prompt_embeds", "negative_prompt_embeds"),
        )
    } | {
        "a hires pass": options.has_hires_pass,
        "feature_reuse": options.feature_reuse > 1,
        "output_reuse": options.output_reuse > 1,
        "guidance_interval": options.guidance_interval != (0.0, 1.0),
    }
    for name, is_passed in conflicting.items():
        if is_passed:
            raise UsageError(
                f"{name} with refiner_switch_at is unsupported",
                hint="run base and refiner in two calls, with denoising_end and denoising_start",
            )
