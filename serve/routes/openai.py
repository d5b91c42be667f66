"""OpenAI's image and model endpoints with this server's extensions."""

import base64
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
from sdrt.bundle.manifest import SHALLOW
from sdrt.runtime.images import image_from_bytes
from sdrt.runtime.upscaling import list_upscalers
from sdrt.serve.control import CONTROL_IMAGES, build_control_options
from sdrt.serve.dependencies import ServerContext, get_context
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.generation import build_openai_request, respond
from sdrt.serve.image_encoding import MAX_PIXELS, mask_from_alpha
from sdrt.serve.model_cards import get_card
from sdrt.serve.model_manager import LoadedModel
from sdrt.serve.schemas import ControlFields, EditRequest, GenerationRequest
from sdrt.serve.strict_json import StrictRoute

router = APIRouter(prefix="/v1", route_class=StrictRoute)

IMAGE_FIELDS = ("image", "image[]")
# Fields that a form may repeat.
LIST_FIELDS = (*ControlFields.model_fields, "guidance_interval")
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")


@router.get("/models")
async def models(request: Request) -> Response:
    """The models of this server."""
    context = get_context(request)
    data = [
        await context.run_in_thread(_describe_model, context, name)
        for name in context.models.sources
    ]
    return json_response({"object": "list", "data": data})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One model."""
    context = get_context(request)
    resolved = context.models.resolve_name(name)
    return json_response(await context.run_in_thread(_describe_model, context, resolved))


def _describe_model(context: ServerContext, name: str) -> dict[str, Any]:
    models, source = context.models, context.models.sources[name]
    manifest, loaded = models.find_manifest(name), models.find(name)
    sizes = [f"{width}x{height}" for width, height in manifest.sizes] if manifest else []
    controlnets, ip_adapter, refiner = source.controlnets, source.ip_adapter, source.refiner
    if pipe := loaded.pipe if loaded else None:
        controlnets = tuple(pipe.control_nets)
        ip_adapter = pipe.ip_adapter.name if pipe.ip_adapter else None
        refiner = pipe.refiner.manifest.name if pipe.refiner else None
    components = pipe.engines if pipe else manifest.components if manifest else {}
    card = get_card(manifest.source if manifest else "")
    return {
        "id": name,
        "object": "model",
        "created": models.created,
        "owned_by": "sdrt",
        "state": models.states[name],
        "loaded": loaded is not None,
        "pinned": name in context.settings.pinned_models,
        "memory_bytes": models.size_bytes(name),
        "loads": models.loads[name],
        "evictions": models.evictions[name],
        "sizes": sizes,
        "default_size": sizes[0] if sizes else None,
        "size_multiple": manifest.multiple if manifest else None,
        "backend": pipe.backend if pipe else None,
        "precision": pipe.compute_precision if pipe else None,
        "feature_reuse": SHALLOW in components,
        "upscalers": list_upscalers(),
        "controlnets": controlnets,
        "ip_adapter": ip_adapter,
        "refiner": refiner,
        "description": card.description,
        "prompt_examples": card.prompt_examples,
    }


@router.post("/images/generations")
async def generations(request: Request, body: GenerationRequest) -> Response:
    """Generate images from a prompt."""
    context = get_context(request)
    inputs = await context.run_in_thread(build_control_options, body)
    async with context.models.use(body.model) as model:
        engine_request = build_openai_request(model, body, inputs)
        return await respond(request, body, engine_request, "image_generation")


EDIT_FORM = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/EditForm"}}},
    }
}


@router.post("/images/edits", openapi_extra=EDIT_FORM)
async def edits(request: Request) -> Response:
    """Edit an image; the area to repaint is transparent in the mask."""
    context = get_context(request)
    _require_form(request)
    try:
        async with request.form(max_files=16, max_fields=80) as form:
            body = await _parse_edit_form(form)
            files = {name: await _read_upload(form, name) for name in (*IMAGE_FIELDS, "mask")}
    except MultiPartException as error:
        raise ApiError(400, f"invalid form: {error.message}", code="invalid_form") from None
    inputs = await context.run_in_thread(_decode_uploads, files)
    inputs |= await context.run_in_thread(build_control_options, body)
    inputs |= {"strength": body.strength}
    async with context.models.use(body.model) as model:
        if body.size in (None, "auto"):
            body.size = _nearest_size(model, inputs["image"])
        engine_request = build_openai_request(model, body, inputs)
        return await respond(request, body, engine_request, "image_edit")


def _require_form(request: Request) -> None:
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type not in FORM_TYPES:  # a form without files fails on the missing image
        message = f"expected Content-Type multipart/form-data, received {content_type or 'none'}"
        raise ApiError(415, message, code="invalid_type")


async def _parse_edit_form(form: FormData) -> EditRequest:
    """Validate the fields of the form, whose numbers are text; rejects duplicates but of lists."""
    fields: dict[str, Any] = {}
    for name in form:
        if name in (*IMAGE_FIELDS, "mask"):
            continue
        values = [await _read_field(name, value) for value in form.getlist(name)]
        fields[name] = values if name in LIST_FIELDS and len(values) > 1 else values[0]
        if len(values) > 1 and name not in LIST_FIELDS:
            raise ApiError(400, f"duplicate field {name!r}", name)
    try:
        return EditRequest.model_validate(fields, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


async def _read_field(name: str, value: UploadFile | str) -> str:
    """The text of a field; of an image that is a file, its base64."""
    if isinstance(value, str):
        return value
    if name not in CONTROL_IMAGES:
        raise ApiError(400, f"{name} must be text, not a file", name)
    return base64.b64encode(await value.read()).decode("ascii")


async def _read_upload(form: FormData, name: str) -> bytes | None:
    value = form.get(name)
    if isinstance(value, str):
        raise ApiError(400, f"{name} must be a file, not text", name)
    return await value.read() if isinstance(value, UploadFile) else None


def _decode_uploads(files: Mapping[str, bytes | None]) -> dict[str, Any]:
    image, *others = [files[name] for name in IMAGE_FIELDS if files[name] is not None] or [None]
    if image is None or others:
        raise ApiError(400, "expected exactly one image; send it as the file image", "image")
    mask = files["mask"]
    return {
        "image": image_from_bytes(image, MAX_PIXELS),
        "mask_image": mask_from_alpha(image_from_bytes(mask, MAX_PIXELS)) if mask else None,
    }


def _nearest_size(model: LoadedModel, image: Image.Image) -> str:
    """The size of the model whose aspect ratio is closest to that of the image."""

    def distance(size: str) -> float:
        width, height = parse_size(size)
        return abs(math.log(width / height * image.height / image.width))

    return min(model.sizes, key=distance)
