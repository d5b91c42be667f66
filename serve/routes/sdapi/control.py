"""Units of the ControlNet extension of A1111 (`alwayson_scripts.controlnet`) as generation
options, and the lists that its clients read.

Follows the rule of `fields`: what would change the image and is not supported is rejected by name.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from sdrt.runtime.images import convert_to_rgb
from sdrt.serve.dependencies import get_context
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.image_encoding import decode_base64_image, encode_base64_image
from sdrt.serve.model_manager import LoadedModel
from sdrt.serve.schemas import MAX_IMAGES, value_or
from sdrt.serve.strict_json import StrictRoute

from .fields import is_neutral
from .inpainting import CROP, FILL, JUST_RESIZE, Size, resize_image
from .options import match_model_name
from .preprocessing import MODULES, Preprocessor, parse_module

router = APIRouter(prefix="/controlnet", route_class=StrictRoute)
log = logging.getLogger("sdrt.serve")

SCRIPT = "controlnet"
VERSION = 3  # of the extension's API
MAX_UNITS = 8
# The extension's names of its modes, and those of its older versions.
RESIZE_MODES = {
    "just resize": JUST_RESIZE,
    "inner fit (scale to fit)": CROP,
    "crop and resize": CROP,
    "scale to fit (inner fit)": CROP,
    "outer fit (shrink to fit)": FILL,
    "resize and fill": FILL,
    "envelope (outer fit)": FILL,
    "0": JUST_RESIZE,
    "1": CROP,
    "2": FILL,
}
# Preprocessors of IP-Adapters, which have no other.
IP_ADAPTER_MODULES = ("ip-adapter", "clip")
# By field: the values that change nothing; the first is reported.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "control_mode": ("Balanced", 0, "0"),
    "guessmode": (False, 0),
    "mask": (None, ""),
    "mask_image": (None, ""),
    "effective_region_mask": (None, ""),
    "hr_option": ("Both", "HiResFixOption.BOTH", 0),
    "union_control_type": ("Unknown",),
    "batch_images": ("", None),
    "ipadapter_input": (None, []),
    "advanced_weighting": (None, []),
    "pulid_mode": ("Fidelity",),
    "batch_modifiers": ([],),
}
# By field: why it has no effect here.
IGNORED: dict[str, str] = {
    **dict.fromkeys(("low_vram", "lowvram"), "memory is planned for all components"),
    **dict.fromkeys(("save_detected_map", "use_preview_as_input", "loopback"), "of the web page"),
    **dict.fromkeys(("is_ui", "input_mode", "batch_image_dir", "output_dir"), "of the web page"),
    **dict.fromkeys(("generated_image", "batch_mask_dir", "animatediff_batch"), "of the web page"),
    "inpaint_crop_input_image": "read with inpaint_full_res",
}


class ControlNetUnit(BaseModel):
    """One unit; other fields are checked by name."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, description="a net of controlnet/model_list, or an IP-Adapter")
    image: str | dict[str, str | None] | None = Field(
        None, description="base64; without it that of img2img"
    )
    input_image: str | None = Field(None, description="an older name of image")
    weight: float | None = Field(1.0, ge=0.0, le=2.0)
    guidance_start: float | None = Field(0.0, ge=0.0, le=1.0)
    guidance_end: float | None = Field(1.0, ge=0.0, le=1.0)
    resize_mode: str | int | None = Field(
        "Crop and Resize", description="of a control image of another ratio"
    )
    module: str | None = Field(
        "none", description="none or canny; for others send images that are preprocessed"
    )
    processor_res: int | None = Field(
        -1, description="the shorter side at which canny runs; -1: that of the images to generate"
    )
    pixel_perfect: bool | None = Field(False, description="true: as processor_res -1")
    threshold_a: float | None = Field(-1, description="canny's low threshold; -1: 100")
    threshold_b: float | None = Field(-1, description="canny's high threshold; -1: 200")


class DetectRequest(BaseModel):
    """The extension's request for control images, with its defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    controlnet_module: str | None = Field("none", description="none or canny")
    controlnet_input_images: list[str] = Field([], max_length=MAX_IMAGES, description="base64")
    controlnet_images: list[str] = Field([], max_length=MAX_IMAGES, description="an older name")
    controlnet_masks: list[str] | None = Field(None, description="rejected unless empty")
    controlnet_processor_res: int | None = Field(512, description="the shorter side; -1: as it is")
    controlnet_threshold_a: float | None = Field(64, description="canny's low threshold")
    controlnet_threshold_b: float | None = Field(64, description="canny's high threshold")
    low_vram: bool | None = Field(False, description="ignored")


@dataclass(frozen=True, slots=True)
class InputImage:
    """The image of img2img, which units without an image of their own read."""

    image: Image
    only_masked: bool


def take_units(extra: Mapping[str, Any]) -> tuple[dict[str, Any], list[ControlNetUnit]]:
    """The fields without the units, and the units that are enabled.

    Args:
        extra: The fields of a request that its schema does not define.

    Raises:
        ApiError: 400 for what is not a list of units.
    """
    scripts = extra.get("alwayson_scripts")
    if not isinstance(scripts, dict):
        return dict(extra), []
    others, units = {}, []
    for name, script in scripts.items():
        if name.casefold() == SCRIPT:
            units += _parse_units(script.get("args") if isinstance(script, dict) else script)
        else:
            others[name] = script
    return {**extra, "alwayson_scripts": others}, units


def _parse_units(arguments: Any) -> list[ControlNetUnit]:
    listed = [arguments] if isinstance(arguments, dict) else arguments or []
    if not isinstance(listed, list) or not all(isinstance(unit, dict | None) for unit in listed):
        raise _error("args: expected a list of units")
    enabled = [unit for unit in listed if unit and unit.get("enabled", True) not in (False, 0)]
    if len(enabled) > MAX_UNITS:
        raise _error(f"{len(enabled)} units; expected at most {MAX_UNITS}")
    try:
        units = [ControlNetUnit.model_validate(unit) for unit in enabled]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:1]))
        raise _error(f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    for unit in units:
        _check_unit(unit)
    return units


def _check_unit(unit: ControlNetUnit) -> None:
    for name, value in (unit.model_extra or {}).items():
        if name == "enabled":
            continue
        if name in IGNORED:
            log.debug("Ignoring %s of a ControlNet unit: %s", name, IGNORED[name])
        elif name not in NEUTRAL:
            raise _error(f"unknown field {name!r}; remove it")
        elif not is_neutral(value, NEUTRAL[name]):
            raise _error(f"{name} is not supported; remove it or send {NEUTRAL[name][0]!r}")
    if str(unit.resize_mode).casefold() not in (*RESIZE_MODES, "none"):
        modes = "Just Resize, Crop and Resize or Resize and Fill"
        raise _error(f"resize_mode {unit.resize_mode!r}; expected {modes}")


def _error(message: str) -> ApiError:
    return ApiError(
        400, f"alwayson_scripts: controlnet: {message}", "alwayson_scripts", "unsupported_parameter"
    )


def build_control_options(
    model: LoadedModel, units: Sequence[ControlNetUnit], size: Size, start: InputImage | None
) -> dict[str, Any]:
    """The options of a request's units; empty without one.

    Args:
        model: The model to use.
        units: Those that are enabled.
        size: (width, height) of the images.
        start: The input of img2img, if any.

    Raises:
        ApiError: 400 for a net that is not loaded, and for what is not supported.
        UsageError: For an image that cannot be decoded.
    """
    adapter = model.pipe.ip_adapter
    nets: list[tuple[str, ControlNetUnit]] = []
    prompts: list[ControlNetUnit] = []
    for unit in units:
        known = [*model.pipe.control_nets, *([adapter.name] if adapter else [])]
        name = match_model_name(unit.model or "", known)
        if name is None:
            loaded = f"loaded are {', '.join(known)}" if known else "none is loaded"
            raise _error(f"unknown model {unit.model!r}; {loaded} (`sdrt serve --controlnet`)")
        is_prompt = adapter is not None and name == adapter.name
        _check_module(unit, is_prompt)
        if is_prompt:
            prompts.append(unit)
        else:
            nets.append((name, unit))
    options: dict[str, Any] = _image_prompt_options(prompts, start)
    if nets:
        options |= {
            "controlnet": [name for name, _ in nets],
            "control_image": [_prepare_image(unit, start, size) for _, unit in nets],
            "controlnet_conditioning_scale": [value_or(unit.weight, 1.0) for _, unit in nets],
            "control_guidance_start": [value_or(unit.guidance_start, 0.0) for _, unit in nets],
            "control_guidance_end": [value_or(unit.guidance_end, 1.0) for _, unit in nets],
        }
    return options


def _check_module(unit: ControlNetUnit, is_prompt: bool) -> None:
    module = parse_module(unit.module)
    if module is None and is_prompt:
        module = "none" if _is_ip_adapter_module(unit) else None
    if module is None or (is_prompt and module != "none"):
        raise _error(
            f"module {unit.module!r} is not supported: send the image that it would make, with "
            "module 'none'"
        )


def _is_ip_adapter_module(unit: ControlNetUnit) -> bool:
    return str(unit.module).casefold().startswith(IP_ADAPTER_MODULES)


def _image_prompt_options(
    units: Sequence[ControlNetUnit], start: InputImage | None
) -> dict[str, Any]:
    if not units:
        return {}
    if len(units) > 1:
        raise _error(f"{len(units)} units of an IP-Adapter; expected one")
    (unit,) = units
    if (value_or(unit.guidance_start, 0.0), value_or(unit.guidance_end, 1.0)) != (0.0, 1.0):
        raise _error("guidance_start and guidance_end of an IP-Adapter; expected 0 and 1")
    image = _read_image(unit, start)
    return {"ip_adapter_image": [image], "ip_adapter_scale": value_or(unit.weight, 1.0)}


def _read_image(unit: ControlNetUnit, start: InputImage | None) -> Image:
    source: Any = unit.image or unit.input_image
    if isinstance(source, dict):
        if source.get("mask"):
            raise _error("mask of an image is not supported; remove it")
        source = source.get("image")
    if start is not None and start.only_masked:
        raise _error("inpaint_full_res true is not supported with units; send false")
    if source:
        return decode_base64_image(source)
    if start is None:
        raise _error(f"unit of {unit.model!r} without an image; send one as base64")
    return start.image


def _prepare_image(unit: ControlNetUnit, start: InputImage | None, size: Size) -> Image:
    """What the net reads: preprocessed in the size of the images unless a resolution is sent."""
    image = convert_to_rgb(_read_image(unit, start))
    mode = RESIZE_MODES.get(str(unit.resize_mode).casefold(), CROP)
    preprocessor = Preprocessor(
        parse_module(unit.module) or "none",
        None if unit.pixel_perfect else unit.processor_res,
        (unit.threshold_a, unit.threshold_b),
    )
    if unit.pixel_perfect or value_or(unit.processor_res, -1) < 0:
        return preprocessor.compute(resize_image(image, size, mode))
    return resize_image(preprocessor.compute(image), size, mode)


@router.get("/version")
async def version() -> Response:
    """The version of the extension's API."""
    return json_response({"version": VERSION})


@router.get("/model_list")
async def model_list(request: Request) -> Response:
    """The nets and the IP-Adapter of the default model, as `model` names them."""
    async with get_context(request).models.use(None) as model:
        adapter = [model.pipe.ip_adapter.name] if model.pipe.ip_adapter else []
        return json_response({"model_list": [*model.pipe.control_nets, *adapter]})


@router.get("/module_list")
async def module_list() -> Response:
    """The preprocessors."""
    return json_response({"module_list": MODULES, "module_detail": {}})


@router.get("/settings")
async def settings() -> Response:
    """How many units a request may have."""
    return json_response({"control_net_unit_count": MAX_UNITS})


@router.post("/detect")
async def detect(request: Request, body: DetectRequest) -> Response:
    """Compute control images, for `image` of units whose `module` is none."""
    if body.controlnet_masks:
        raise ApiError(400, "controlnet_masks is not supported; remove it", "controlnet_masks")
    module = parse_module(body.controlnet_module)
    if module is None:
        message = f"module {body.controlnet_module!r}; expected one of {', '.join(MODULES)}"
        raise ApiError(400, message, "controlnet_module", "unsupported_parameter")
    preprocessor = Preprocessor(
        module,
        body.controlnet_processor_res,
        (body.controlnet_threshold_a, body.controlnet_threshold_b),
    )
    texts = body.controlnet_input_images or body.controlnet_images
    if not texts:
        raise ApiError(400, "no image; send controlnet_input_images", "controlnet_input_images")
    run_in_thread = get_context(request).run_in_thread
    images = [await run_in_thread(_detect, preprocessor, text) for text in texts]
    return json_response({"images": images, "info": "Success"})


def _detect(preprocessor: Preprocessor, text: str) -> str:
    return encode_base64_image(preprocessor.compute(convert_to_rgb(decode_base64_image(text))))
