"""OpenAI's images and models endpoints, with what this server takes and tells beyond them."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import Response

from sdrt.bundle import parse_size
from sdrt.runtime.images import image_from_bytes
from sdrt.serve.dependencies import Context, context_of
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.generation import answer, call_from
from sdrt.serve.image_encoding import MAX_PIXELS, mask_from_alpha
from sdrt.serve.model_manager import Model
from sdrt.serve.schemas import Edit, Generation
from sdrt.serve.strict_json import StrictRoute

router = APIRouter(prefix="/v1", route_class=StrictRoute)

IMAGE_FIELDS = ("image", "image[]")


@router.get("/models")
async def models(request: Request) -> Response:
    """The models of this server."""
    context = context_of(request)
    data = [_described(context, name) for name in context.models.sources]
    return json_response({"object": "list", "data": data})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One model."""
    context = context_of(request)
    return json_response(_described(context, context.models.known(name)))


def _described(context: Context, name: str) -> dict[str, Any]:
    sizes = context.models.sizes(name)
    return {
        "id": name,
        "object": "model",
        "created": context.models.begun,
        "owned_by": "sdrt",
        "state": context.models.states[name],
        "sizes": sizes,
        "default_size": sizes[0] if sizes else None,
    }


@router.post("/images/generations")
async def generations(request: Request, body: Generation) -> Response:
    """Pictures of a prompt."""
    context = context_of(request)
    found = context.models.named(body.model)
    return await answer(request, body, call_from(found, body, {}), "image_generation")


EDIT_FORM = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/EditForm"}}},
    }
}


@router.post("/images/edits", openapi_extra=EDIT_FORM)
async def edits(request: Request) -> Response:
    """Pictures of a prompt that start from a picture; a mask is transparent where to make new."""
    context = context_of(request)
    try:
        async with request.form(max_files=4, max_fields=60) as form:
            body = _edit_from(form)
            files = {name: await _bytes(form, name) for name in (*IMAGE_FIELDS, "mask")}
    except MultiPartException as error:
        raise ApiError(400, f"no valid form: {error.message}", code="invalid_form") from None
    found = context.models.named(body.model)
    given = await context.off_loop(_pictures_from, files)
    if body.size in (None, "auto"):
        body.size = _nearest(found, given["image"])
    given |= {"strength": body.strength}
    return await answer(request, body, call_from(found, body, given), "image_edit")


def _edit_from(form: FormData) -> Edit:
    """The form's fields, whose numbers are text; a field that comes twice is refused."""
    fields = {name: value for name, value in form.items() if name not in (*IMAGE_FIELDS, "mask")}
    for name in form:
        if len(form.getlist(name)) > 1:
            raise ApiError(400, f"the field {name!r} comes twice; one is taken", name)
    try:
        return Edit.model_validate(fields, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


async def _bytes(form: FormData, name: str) -> bytes | None:
    value = form.get(name)
    if isinstance(value, str):
        raise ApiError(400, f"{name} is text; send it as a file", name)
    return await value.read() if isinstance(value, UploadFile) else None


def _pictures_from(files: Mapping[str, bytes | None]) -> dict[str, Any]:
    image, *more = [files[name] for name in IMAGE_FIELDS if files[name] is not None] or [None]
    if image is None or more:
        raise ApiError(400, "one image is taken; send it as the file image", "image")
    mask = files["mask"]
    return {
        "image": image_from_bytes(image, MAX_PIXELS),
        "mask_image": mask_from_alpha(image_from_bytes(mask, MAX_PIXELS)) if mask else None,
    }


def _nearest(found: Model, image: Image.Image) -> str:
    """The model's size whose shape is nearest to a picture's."""

    def distance(size: str) -> float:
        width, height = parse_size(size)
        return abs(math.log(width / height * image.height / image.width))

    return min(found.sizes, key=distance)
