"""`/sdapi`'s extras: images resized by the resamplers that Pillow has, and nothing made."""

from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import Response

from sdrt.errors import UsageError
from sdrt.runtime.images import rgb_image, text_of
from sdrt.serve.dependencies import context_of
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.image_encoding import MAX_PIXELS, base64_from_image, image_from_base64
from sdrt.serve.schemas import UpscaledImage, UpscaledImages, Upscaling
from sdrt.serve.strict_json import StrictRoute

from .fields import LOOKS_UNUSED, is_one_of, unsupported

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
async def extra_single_image(request: Request, body: UpscaledImage) -> Response:
    """One image, resized."""
    _check(body)
    image = await context_of(request).off_loop(_upscaled_file, body, body.image)
    return json_response({"html_info": "", "image": image})


@router.post("/extra-batch-images")
async def extra_batch_images(request: Request, body: UpscaledImages) -> Response:
    """Several images, each resized."""
    _check(body)
    off_loop = context_of(request).off_loop
    images = [await off_loop(_upscaled_file, body, each.data) for each in body.imageList]
    return json_response({"html_info": "", "images": images})


def _check(body: Upscaling) -> None:
    for name, value in (body.model_extra or {}).items():
        if name in NEUTRAL and not is_one_of(value, (NEUTRAL[name],)):
            raise unsupported(name, NEUTRAL[name])
        unknown = name not in NEUTRAL and name not in IGNORED
        if unknown and not is_one_of(value, LOOKS_UNUSED):
            raise ApiError(
                400, f"the field {name!r} is not known; leave it out", name, "unknown_parameter"
            )


def _upscaled_file(body: Upscaling, text: str) -> str:
    image = image_from_base64(text)
    return base64_from_image(upscaled(rgb_image(image), body), text_of(image))


def upscaled(image: Image.Image, body: Upscaling) -> Image.Image:
    """An image resized, by two upscalers in their shares where two are named; raises ApiError 400
    for an unknown one, UsageError for a result that is too large.
    """
    first, second = (_upscaler(body, name) for name in ("upscaler_1", "upscaler_2"))
    share = body.extras_upscaler_2_visibility or 0.0
    if first is None:
        return image
    made = _resized(image, body, first)
    if second is None or share == 0.0:
        return made
    return Image.blend(made, _resized(image, body, second), share)


def _upscaler(body: Upscaling, field: str) -> Image.Resampling | None:
    name = str(getattr(body, field) or "None")
    if name == "None":
        return None
    known = {each.casefold(): kind for each, kind in UPSCALERS.items()}
    if name.casefold() not in known:
        have = ", ".join(("None", *UPSCALERS))
        raise ApiError(400, f"{field} {name!r} is not supported; expected one of {have}", field)
    return known[name.casefold()]


def _resized(image: Image.Image, body: Upscaling, kind: Image.Resampling) -> Image.Image:
    wanted = body.upscaling_resize_w or 512, body.upscaling_resize_h or 512
    scale = body.upscaling_resize or 2.0
    if body.resize_mode == 1:
        scale = max(wanted[0] / image.width, wanted[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError(f"an image of {size[0]}x{size[1]}; at most {MAX_PIXELS} pixels are made")
    made = image.resize(size, kind)
    if body.resize_mode != 1 or not body.upscaling_crop:
        return made
    left, top = (size[0] - wanted[0]) // 2, (size[1] - wanted[1]) // 2
    return made.crop((left, top, left + wanted[0], top + wanted[1]))


@router.get("/upscalers")
async def upscalers() -> Response:
    """What `upscaler_1` and `upscaler_2` take."""
    rest: dict[str, Any] = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return json_response([{"name": name, **rest} for name in ("None", *UPSCALERS)])
