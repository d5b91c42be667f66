"""A1111's fields of a second pass (`enable_hr`) as generation options."""

from collections.abc import Mapping
from typing import Any

from sdrt.runtime.samplers.registry import sampler_title
from sdrt.serve.errors import ApiError
from sdrt.serve.model_manager import LoadedModel
from sdrt.serve.schemas import HiresRequest

from .fields import unsupported_error
from .sampling import resolve_scheduler_config

DEFAULT_SCALE, DEFAULT_STRENGTH = 2.0, 0.75
SAME_SAMPLER = ("", "Use same sampler", "Use same scheduler")
# By field: values that change nothing; the first is reported.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hr_checkpoint_name": (None, "", "Use same checkpoint"),
    "hr_additional_modules": (None, [], ["Use same choices"]),
    "firstphase_width": (0, None),
    "firstphase_height": (0, None),
}


def build_hires_options(model: LoadedModel, body: HiresRequest) -> Mapping[str, Any]:
    """The options of a request's second pass; empty without one.

    Raises:
        ApiError: 400 for what is not supported.
    """
    if not body.enable_hr:
        return {}
    for name, neutral in NEUTRAL.items():
        if getattr(body, name) not in neutral:
            raise unsupported_error(name, neutral[-1])
    size = body.hr_resize_x or 0, body.hr_resize_y or 0
    scale = DEFAULT_SCALE if body.hr_scale is None else body.hr_scale
    strength = body.denoising_strength
    if strength == 0.0:
        raise ApiError(
            400,
            "denoising_strength 0 with enable_hr is a pass of no steps; use extra-single-image",
            "denoising_strength",
        )
    upscaler = body.hr_upscaler or "Latent"
    options = {
        **({"hires_size": size} if any(size) else {"hires_scale": scale}),
        "hires_steps": body.hr_second_pass_steps,
        "hires_strength": DEFAULT_STRENGTH if strength is None else strength,
        "hires_upscaler": "Lanczos" if upscaler == "None" else upscaler,
        "hires_scheduler": _resolve_scheduler_name(model, body),
        "hires_prompt": body.hr_prompt or None,
        "hires_negative_prompt": body.hr_negative_prompt or None,
        "hires_guidance_scale": body.hr_cfg,
    }
    return {name: value for name, value in options.items() if value is not None}


def _resolve_scheduler_name(model: LoadedModel, body: HiresRequest) -> str | None:
    """The second pass's sampler, which takes the first's sampler or schedule where it has none of
    its own; None for the first's.
    """
    sampler, schedule = (
        None if text is None or text.strip() in SAME_SAMPLER else text
        for text in (body.hr_sampler_name, body.hr_scheduler)
    )
    if sampler is None and schedule is None:
        return None
    if body.eta is not None:
        raise ApiError(
            400, "eta is not supported with a sampler of the second pass; remove one", "eta"
        )
    first = body.sampler_name or body.sampler_index
    config = resolve_scheduler_config(
        model.pipe, sampler or first, schedule or body.scheduler, None
    )
    return sampler_title(config) if config else None
