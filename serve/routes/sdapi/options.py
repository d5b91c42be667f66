"""A1111's options: stored for the server, or sent with one request as `override_settings`. Both
follow the rule of `fields`.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from sdrt.serve.dependencies import ServerContext, get_context
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.model_manager import ModelManager
from sdrt.serve.strict_json import StrictRoute

from .fields import EMPTY_VALUES, is_neutral, unsupported_error

router = APIRouter(prefix="/sdapi/v1", route_class=StrictRoute)

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
RNG = {"cpu": "cpu", "gpu": "cuda", "nv": "cuda"}
INTEGER, MAX_SKIP = TypeAdapter(int), 100
MAX_OPTIONS, MAX_CHARACTERS = 400, 100_000
# Supported options and their defaults.
USED: dict[str, Any] = {
    "sd_model_checkpoint": None,
    "CLIP_stop_at_last_layers": 1,
    "samples_format": "png",
    "jpeg_quality": 80,
    "randn_source": "CPU",
}
# Options that would change images, with the values that do not; the first is reported.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "sd_vae": ("Automatic", "None", ""),
    "sd_hypernetwork": ("None", ""),
    "sd_lora": ("None", ""),
    "forge_additional_modules": ([],),
    "forge_inference_memory": (0,),
    "eta_ddim": (0,),
    "eta_ancestral": (1,),
    "eta_noise_seed_delta": (0,),
    "ddim_discretize": ("uniform",),
    "s_churn": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "k_sched_type": ("Automatic",),
    "sigma_min": (0,),
    "sigma_max": (0,),
    "rho": (0,),
    "beta_dist_alpha": (0.6,),
    "beta_dist_beta": (0.6,),
    "sd_noise_schedule": ("Default",),
    "sgm_noise_multiplier": (False,),
    "always_discard_next_to_last_sigma": (False,),
    "skip_early_cond": (0,),
    "token_merging_ratio": (0,),
    "token_merging_ratio_img2img": (0,),
    "initial_noise_multiplier": (1,),
    "inpainting_mask_weight": (1,),
    "img2img_color_correction": (False,),
    "img2img_fix_steps": (False,),
    "img2img_background_color": ("#ffffff",),
    "img2img_extra_noise": (0,),
    "upscaler_for_img2img": ("None", ""),
    "face_restoration": (False,),
    "tiling": (False,),
    "enable_emphasis": (True,),
    "enable_quantization": (False,),
    "use_old_emphasis_implementation": (False,),
    "use_old_karras_scheduler_sigmas": (False,),
    "no_dpmpp_sde_batch_determinism": (False,),
    "sd_vae_encode_method": ("Full",),
    "sd_vae_decode_method": ("Full",),
    "sdxl_crop_top": (0,),
    "sdxl_crop_left": (0,),
}
# Prefixes of options about saving, display, logging and memory: stored and returned, no effect on
# images.
WITHOUT_EFFECT: tuple[str, ...] = (
    *("send_", "save_", "samples_", "grid_", "outdir_", "directories_", "show_", "live_", "ui_"),
    *("hide_", "gallery_", "api_", "interrogate_", "webp_", "export_", "font", "notification_"),
    *("quicksettings", "keyedit_", "extra_networks_", "temp_", "sd_checkpoint", "do_not_"),
    *("return_", "js_", "memmon_", "print_", "list_", "enable_pnginfo", "training_"),
    *("multiple_tqdm", "add_", "disable_", "image_browser", "n_rows"),
)
ALWAYS_SENT = {"send_seed": True, "send_size": True}


@dataclass(slots=True)
class ServerOptions:
    """The options that clients have set for all requests, by name and validated."""

    values: dict[str, Any] = field(default_factory=dict)


def request_options(request: Request, override: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of one request; raises ApiError 400 for unsupported ones."""
    models = get_context(request).models
    return USED | get_server_options(request).values | check_options(override or {}, models)


def get_server_options(request: Request) -> ServerOptions:
    options: ServerOptions = request.app.state.sd_options
    return options


def check_options(sent: Mapping[str, Any], models: ModelManager) -> dict[str, Any]:
    """Validate options; raises ApiError 400 for the first that would change images and is not
    supported.
    """
    return {
        name: _check_option(name, value, models)
        for name, value in sent.items()
        if value is not None
    }


def _check_option(name: str, value: Any, models: ModelManager) -> Any:
    if name == "sd_model_checkpoint":
        return resolve_model_name(value, models)
    if name == "CLIP_stop_at_last_layers":
        return max(1, _check_integer(name, value, 0, MAX_SKIP))  # A1111 treats 0 as 1
    if name == "jpeg_quality":
        return _check_integer(name, value, 1, 100)
    for option, known in (("samples_format", FORMATS), ("randn_source", RNG)):
        if name == option and str(value).casefold() not in known:
            raise ApiError(400, f"{name} {value!r}; expected {', '.join(known)}", name)
    if name in USED:
        return value
    if name in NEUTRAL:
        if not is_neutral(value, NEUTRAL[name]):
            raise unsupported_error(name, NEUTRAL[name][0])
        return value
    if name.startswith(WITHOUT_EFFECT) or is_neutral(value, EMPTY_VALUES):
        return value
    raise ApiError(400, f"unknown option {name!r}; remove it", name, "unknown_parameter")


def _check_integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = INTEGER.validate_python(value)
    except ValidationError:
        number = low - 1
    if not low <= number <= high:
        raise ApiError(400, f"{name} {value!r}; expected a whole number from {low} to {high}", name)
    return number


def resolve_model_name(value: Any, models: ModelManager) -> str | None:
    """The model that a client means by a name or title, which may have a hash or a suffix; None for
    the default. Raises ApiError 400 with similar names.
    """
    name = str(value).strip()
    if name in ("", "None"):
        return None
    if known := match_model_name(name, models.sources):
        return known
    similar = difflib.get_close_matches(name, models.sources, n=3, cutoff=0.4) or models.sources
    raise ApiError(
        400,
        f"unknown model {name!r}; similar: {', '.join(similar)}",
        "sd_model_checkpoint",
        "model_not_found",
    )


def match_model_name(text: str, names: Iterable[str]) -> str | None:
    """The one of `names` that a title means; the title may have a hash or a suffix."""
    head, _, tail = text.strip().removesuffix("]").rpartition(" [")
    name = (head or tail).strip().casefold()
    bare = name.removesuffix(".safetensors").removesuffix(".ckpt")
    return next((known for known in names if known.casefold() in (name, bare)), None)


@router.get("/options")
async def options(request: Request) -> Response:
    """The options in effect for requests that do not override them."""
    return json_response(_current_options(get_context(request), get_server_options(request)))


def _current_options(context: ServerContext, options: ServerOptions) -> dict[str, Any]:
    first = next(iter(context.models.sources))
    values = {name: values[0] for name, values in NEUTRAL.items()}
    current = USED | ALWAYS_SENT | values | options.values
    return current | {"sd_model_checkpoint": current["sd_model_checkpoint"] or first}


@router.post("/options")
async def set_options(request: Request, body: dict[str, Any]) -> Response:
    """Set options for all later requests: all of them or, on an error, none."""
    context, stored = get_context(request), get_server_options(request)
    store_options(context, stored, check_options(body, context.models))
    return json_response(None)


def store_options(context: ServerContext, stored: ServerOptions, changed: dict[str, Any]) -> None:
    """Store validated options.

    Raises:
        ApiError: 400 on Ray, whose replicas share no options, and for too many options.
    """
    updated = ServerOptions(stored.values | changed)
    before, after = _current_options(context, stored), _current_options(context, updated)
    if context.models.on_demand and any(before[name] != after[name] for name in USED):
        raise ApiError(
            400,
            "options cannot be stored on Ray Serve; send override_settings with each request",
        )
    if len(updated.values) > MAX_OPTIONS or len(json.dumps(updated.values)) > MAX_CHARACTERS:
        raise ApiError(400, "too many or too long options", code="too_many_options")
    stored.values = updated.values
