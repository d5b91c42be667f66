"""A1111's extras: resizing with Pillow's resampling filters. No model is involved."""

from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import Response

from sdrt.errors import UsageError
from sdrt.runtime.images import convert_to_rgb, read_parameters
from sdrt.serve.dependencies import get_context
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.image_encoding import MAX_PIXELS, decode_base64_image, encode_base64_image
from sdrt.serve.schemas import UpscaleBatchRequest, UpscaleImageRequest, UpscaleRequest
from sdrt.serve.strict_json import StrictRoute

from .fields import EMPTY_VALUES, is_neutral, unsupported_error

router = APIRouter(prefix="/sdapi/v1", route_class=StrictRoute)

UPSCALERS = {
    "Lanczos": Image.Resampling.LANCZOS,
    "Nearest": Image.Resampling.NEAREST,
    "Bicubic": Image.Resampling.BICUBIC,
    "Bilinear": Image.Resampling.BILINEAR,
}
NEUTRAL = {"gfpgan_visibility": 0, "codeformer_visibility": 0}
IGNORED = ("codeformer_weight", "show_extras_results", "upscale_first", "rb_enabled", "name")


@router.post("/extra-single-image")
async def extra_single_image(request: Request, body: UpscaleImageRequest) -> Response:
    """Resize one image."""
    _check_fields(body)
    image = await get_context(request).run_in_thread(_upscale_base64, body, body.image)
    return json_response({"html_info": "", "image": image})


@router.post("/extra-batch-images")
async def extra_batch_images(request: Request, body: UpscaleBatchRequest) -> Response:
    """Resize several images."""
    _check_fields(body)
    run_in_thread = get_context(request).run_in_thread
    images = [await run_in_thread(_upscale_base64, body, item.data) for item in body.imageList]
    return json_response({"html_info": "", "images": images})


def _check_fields(body: UpscaleRequest) -> None:
    for name, value in (body.model_extra or {}).items():
        if name in NEUTRAL and not is_neutral(value, (NEUTRAL[name],)):
            raise unsupported_error(name, NEUTRAL[name])
        unknown = name not in NEUTRAL and name not in IGNORED
        if unknown and not is_neutral(value, EMPTY_VALUES):
            raise ApiError(400, f"unknown field {name!r}; remove it", name, "unknown_parameter")


def _upscale_base64(body: UpscaleRequest, text: str) -> str:
    image = decode_base64_image(text)
    return encode_base64_image(upscale_image(convert_to_rgb(image), body), read_parameters(image))


def upscale_image(image: Image.Image, body: UpscaleRequest) -> Image.Image:
    """Resize an image, blending the results of two upscalers if two are named.

    Raises:
        ApiError: 400 for an unknown upscaler.
        UsageError: The result would be too large.
    """
    first, second = (_parse_upscaler(body, name) for name in ("upscaler_1", "upscaler_2"))
    weight = body.extras_upscaler_2_visibility or 0.0
    if first is None:
        return image
    resized = _resize(image, body, first)
    if second is None or weight == 0.0:
        return resized
    return Image.blend(resized, _resize(image, body, second), weight)


def _parse_upscaler(body: UpscaleRequest, field: str) -> Image.Resampling | None:
    name = str(getattr(body, field) or "None")
    if name == "None":
        return None
    known = {title.casefold(): resampling for title, resampling in UPSCALERS.items()}
    if name.casefold() not in known:
        expected = ", ".join(("None", *UPSCALERS))
        message = f"{field} {name!r} is not supported; expected one of {expected}"
        raise ApiError(400, message, field)
    return known[name.casefold()]


def _resize(image: Image.Image, body: UpscaleRequest, resampling: Image.Resampling) -> Image.Image:
    target = body.upscaling_resize_w or 512, body.upscaling_resize_h or 512
    scale = body.upscaling_resize or 2.0
    if body.resize_mode == 1:
        scale = max(target[0] / image.width, target[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError(
            f"an image of {size[0]}x{size[1]} exceeds the limit of {MAX_PIXELS} pixels"
        )
    resized = image.resize(size, resampling)
    if body.resize_mode != 1 or not body.upscaling_crop:
        return resized
    left, top = (size[0] - target[0]) // 2, (size[1] - target[1]) // 2
    return resized.crop((left, top, left + target[0], top + target[1]))


@router.get("/upscalers")
async def upscalers() -> Response:
    """The names that `upscaler_1` and `upscaler_2` accept."""
    rest: dict[str, Any] = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return json_response([{"name": name, **rest} for name in ("None", *UPSCALERS)])
