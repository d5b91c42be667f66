"""How `/sdapi` handles the fields that its clients send beyond those of the schemas.

One rule: a field that would change the image and is not supported is rejected by name, unless it
has a value that changes nothing. `docs/serving/sdapi.md` documents these tables.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sdrt.serve.errors import ApiError

log = logging.getLogger("sdrt.serve")

# By field: the values that change nothing; messages name the first. Null is always accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([], [""], ["None"], ""),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "s_churn": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "script_name": ("", "None"),
    "infotext": ("",),
    "firstpass_image": ("",),
    "latent_mask": ("",),
    "mask_round": (True,),
    "initial_noise_multiplier": (1,),
    "disable_extra_networks": (False,),
}
# By field: why it has no effect here, whatever its value.
IGNORED: dict[str, str] = {
    **dict.fromkeys(("do_not_save_samples", "do_not_save_grid", "save_images"), "nothing is saved"),
    **dict.fromkeys(("force_task_id", "comments"), "does not affect the image"),
    **dict.fromkeys(("subseed", "seed_enable_extras"), "read with subseed_strength"),
    **dict.fromkeys(("s_tmin", "s_tmax"), "read with s_churn"),
    "hr_distilled_cfg": "read by models of another family",
    "script_args": "read with script_name",
    "image_cfg_scale": "read by instruction-edited models",
    "distilled_cfg_scale": "read by models of another family",
}
# For img2img: what only txt2img reads.
TXT2IMG_ONLY: dict[str, str] = dict.fromkeys(
    ("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y")
    + ("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt")
    + ("hr_negative_prompt", "hr_additional_modules", "hr_cfg")
    + ("firstphase_width", "firstphase_height"),
    "read with enable_hr",
)
# For txt2img: what only img2img reads.
IMG2IMG_ONLY: dict[str, str] = {
    **dict.fromkeys(
        ("resize_mode", "mask_blur", "mask_blur_x", "mask_blur_y", "inpainting_fill")
        + ("inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert")
        + ("include_init_images",),
        "read by img2img",
    ),
}
EMPTY_VALUES: tuple[Any, ...] = ("", False, 0, [], {}, "None")


def check_fields(extra: Mapping[str, Any], ignored: Mapping[str, str]) -> None:
    """Raise ApiError 400 for the first field that would change the image and is not supported.

    Args:
        extra: The fields that the schema does not define.
        ignored: Reasons by field.
    """
    for name, value in extra.items():
        if name in ignored:
            log.debug("Ignoring %s: %s", name, ignored[name])
        elif name in NEUTRAL:
            if not is_neutral(value, NEUTRAL[name]):
                raise unsupported_error(name, NEUTRAL[name][0])
        elif name == "alwayson_scripts":
            check_scripts(value)
        elif not is_neutral(value, EMPTY_VALUES):
            raise ApiError(400, f"unknown field {name!r}; remove it", name, "unknown_parameter")


def unsupported_error(name: str, neutral: Any) -> ApiError:
    """An error that names the field and a value that is accepted."""
    message = f"{name} is not supported; remove it or send {_json(neutral)}"
    return ApiError(400, message, name, "unsupported_parameter")


def _json(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether a value is null or one of `neutral`; numbers and booleans may be strings."""
    if value is None or value in neutral:
        return True
    if not isinstance(value, str):
        return False
    text = value.strip().casefold()
    words = {str(item).casefold() for item in neutral}
    try:
        return text in words or float(text) in [n for n in neutral if not isinstance(n, str)]
    except ValueError:
        return False


def check_scripts(scripts: Any) -> None:
    """Raise ApiError 400 for an enabled script: none is supported."""
    if scripts is None or scripts in ([], ""):
        return
    if not isinstance(scripts, dict):
        raise ApiError(400, "alwayson_scripts: expected an object", "alwayson_scripts")
    for name, script in scripts.items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if not _is_script_disabled(arguments):
            raise ApiError(
                400,
                f"alwayson_scripts: {name!r} is not supported; remove or disable it",
                "alwayson_scripts",
                "unsupported_parameter",
            )


def _is_script_disabled(arguments: Any) -> bool:
    """Whether a script does nothing: it has no arguments, its first one is false, which disables
    most scripts, or every unit is disabled.
    """
    if isinstance(arguments, dict):
        arguments = [arguments]
    if not arguments:
        return True
    if not isinstance(arguments, list):
        return False
    units = [item for item in arguments if isinstance(item, dict)]
    if not all(_is_unit_disabled(unit) for unit in units):
        return arguments[0] is False
    return arguments[0] is False or len(units) == len([a for a in arguments if a is not None])


def _is_unit_disabled(unit: Mapping[str, Any]) -> bool:
    """Whether a unit is disabled; units are enabled by default."""
    if "ad_model" in unit:
        return is_neutral(unit["ad_model"], ("None", ""))
    return unit.get("enabled", unit.get("enable", True)) in (False, 0) or not unit
