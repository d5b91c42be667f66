"""The options of `/sdapi`: kept for the whole server, or sent with one request as
`override_settings`; both are read by the same rule as the fields are.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from sdrt.serve.dependencies import Context, context_of
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.model_manager import Models
from sdrt.serve.strict_json import StrictRoute

from .fields import LOOKS_UNUSED, is_one_of, unsupported

router = APIRouter(prefix="/sdapi/v1", route_class=StrictRoute)

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
RNG = {"cpu": "cpu", "gpu": "cuda", "nv": "cuda"}
INTEGER, MAX_SKIP = TypeAdapter(int), 100
MAX_OPTIONS, MAX_CHARACTERS = 400, 100_000
# Those that are used, with their values until they are set.
USED: dict[str, Any] = {
    "sd_model_checkpoint": None,
    "CLIP_stop_at_last_layers": 1,
    "samples_format": "png",
    "jpeg_quality": 80,
    "randn_source": "CPU",
}
# Those that would change images, with the values that do not, the first being this server's.
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
# What is saved, shown, logged or kept in memory: kept and returned, of no bearing on an image.
WITHOUT_EFFECT: tuple[str, ...] = (
    *("send_", "save_", "samples_", "grid_", "outdir_", "directories_", "show_", "live_", "ui_"),
    *("hide_", "gallery_", "api_", "interrogate_", "webp_", "export_", "font", "notification_"),
    *("quicksettings", "keyedit_", "extra_networks_", "temp_", "sd_checkpoint", "do_not_"),
    *("return_", "js_", "memmon_", "print_", "list_", "enable_pnginfo", "training_"),
    *("multiple_tqdm", "add_", "disable_", "image_browser", "n_rows"),
)
SENT = {"send_seed": True, "send_size": True}


@dataclass(slots=True)
class ServerOptions:
    """What was set for all requests of a server. values: by name, checked"""

    values: dict[str, Any] = field(default_factory=dict)


def options_with(request: Request, override: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that hold for one request; raises ApiError 400 for those not supported."""
    models = context_of(request).models
    return USED | server_options(request).values | checked(override or {}, models)


def server_options(request: Request) -> ServerOptions:
    options: ServerOptions = request.app.state.sd_options
    return options


def checked(sent: Mapping[str, Any], models: Models) -> dict[str, Any]:
    """Options as they are used and returned; raises ApiError 400 for the first that would change
    images and is not supported.
    """
    return {
        name: _checked(name, value, models) for name, value in sent.items() if value is not None
    }


def _checked(name: str, value: Any, models: Models) -> Any:
    if name == "sd_model_checkpoint":
        return model_named(value, models)
    if name == "CLIP_stop_at_last_layers":
        return max(1, _whole(name, value, 0, MAX_SKIP))  # 0 is 1 there
    if name == "jpeg_quality":
        return _whole(name, value, 1, 100)
    for wanted, known in (("samples_format", FORMATS), ("randn_source", RNG)):
        if name == wanted and str(value).casefold() not in known:
            raise ApiError(400, f"{name} {value!r}; expected {', '.join(known)}", name)
    if name in USED:
        return value
    if name in NEUTRAL:
        if not is_one_of(value, NEUTRAL[name]):
            raise unsupported(name, NEUTRAL[name][0])
        return value
    if name.startswith(WITHOUT_EFFECT) or is_one_of(value, LOOKS_UNUSED):
        return value
    raise ApiError(
        400, f"the option {name!r} is not known; leave it out", name, "unknown_parameter"
    )


def _whole(name: str, value: Any, low: int, high: int) -> int:
    try:
        number = INTEGER.validate_python(value)
    except ValidationError:
        number = low - 1
    if not low <= number <= high:
        raise ApiError(400, f"{name} {value!r}; expected a whole number from {low} to {high}", name)
    return number


def model_named(value: Any, models: Models) -> str | None:
    """A model's name from what clients call it: its name or title, with a hash or a suffix, None
    for the first; raises ApiError 400 with the nearest names.
    """
    name = str(value).strip()
    if name in ("", "None"):
        return None
    if known := known_name(name, models.sources):
        return known
    near = difflib.get_close_matches(name, models.sources, n=3, cutoff=0.4) or models.sources
    raise ApiError(
        400,
        f"no model {name!r} is served here; the nearest: {', '.join(near)}",
        "sd_model_checkpoint",
        "model_not_found",
    )


def known_name(text: str, names: Iterable[str]) -> str | None:
    """The one of these names that a client means, whose title may have a hash or a suffix."""
    head, _, tail = text.strip().removesuffix("]").rpartition(" [")
    name = (head or tail).strip().casefold()
    bare = name.removesuffix(".safetensors").removesuffix(".ckpt")
    return next((each for each in names if each.casefold() in (name, bare)), None)


@router.get("/options")
async def options(request: Request) -> Response:
    """What holds for every request that does not say otherwise."""
    return json_response(_told(context_of(request), server_options(request)))


def _told(context: Context, options: ServerOptions) -> dict[str, Any]:
    first = next(iter(context.models.sources))
    values = {name: values[0] for name, values in NEUTRAL.items()}
    told = USED | SENT | values | options.values
    return told | {"sd_model_checkpoint": told["sd_model_checkpoint"] or first}


@router.post("/options")
async def set_options(request: Request, body: dict[str, Any]) -> Response:
    """Set options for all requests to this server, until it ends; all of them or, on an error,
    none.
    """
    context, kept = context_of(request), server_options(request)
    keep(context, kept, checked(body, context.models))
    return json_response(None)


def keep(context: Context, kept: ServerOptions, changed: dict[str, Any]) -> None:
    """Keep checked options; raises ApiError 400 where that cannot be done."""
    after = ServerOptions(kept.values | changed)
    before, then = _told(context, kept), _told(context, after)
    if context.models.on_demand and any(before[name] != then[name] for name in USED):
        raise ApiError(
            400, "a fleet keeps no options; send them with each request as override_settings"
        )
    if len(after.values) > MAX_OPTIONS or len(json.dumps(after.values)) > MAX_CHARACTERS:
        raise ApiError(400, "too many options, or too long ones", code="too_many_options")
    kept.values = after.values
