"""The `/sdapi/v1` endpoints that generate images, and those about running requests.

Fields that are not in the schemas are handled by `fields`.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sdrt.runtime import Preview, Step
from sdrt.runtime.batching.request import GeneratedImage, RequestCancelled, RequestHandle
from sdrt.runtime.images import parse_parameters, read_parameters
from sdrt.runtime.samplers.registry import sampler_title
from sdrt.serve.dependencies import EngineRequest, get_context, get_owner
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.image_encoding import decode_base64_image, encode_base64_image, enlarge_preview
from sdrt.serve.job import ImageJob
from sdrt.serve.model_manager import LoadedModel
from sdrt.serve.schemas import (
    HiresRequest,
    ImageToImageRequest,
    PngInfoRequest,
    TextToImageRequest,
    value_or,
)
from sdrt.serve.strict_json import StrictRoute

from .control import InputImage, build_control_options, take_units
from .fields import IGNORED, IMG2IMG_ONLY, TXT2IMG_ONLY, check_fields
from .hires import build_hires_options
from .inpainting import InpaintingSettings, PreparedInput, prepare_input
from .options import FORMATS, RNG, check_options, get_server_options, request_options, store_options
from .refiner import build_refiner_options
from .sampling import resolve_scheduler_config

router = APIRouter(prefix="/sdapi/v1", route_class=StrictRoute)


@router.post("/txt2img")
async def txt2img(request: Request, body: HiresRequest) -> Response:
    """Generate images from a prompt."""
    extra, units = take_units(body.model_extra or {})
    check_fields(extra, IGNORED | IMG2IMG_ONLY)
    context, options = get_context(request), request_options(request, body.override_settings)
    async with context.models.use(options["sd_model_checkpoint"]) as model:
        size = _requested_size(model, body)
        control = await context.run_in_thread(build_control_options, model, units, size, None)
        refiner = build_refiner_options(model, body)
        inputs = {**build_hires_options(model, body), **refiner, **control}
        engine_request = build_sdapi_request(model, body, options, inputs)
        return await _run_job(request, body, engine_request, options, None)


@router.post("/img2img")
async def img2img(request: Request, body: ImageToImageRequest) -> Response:
    """Generate images from a prompt and an input image."""
    extra, units = take_units(body.model_extra or {})
    check_fields(extra, IGNORED | TXT2IMG_ONLY)
    context, options = get_context(request), request_options(request, body.override_settings)
    async with context.models.use(options["sd_model_checkpoint"]) as model:
        size = _requested_size(model, body)
        prepared = await context.run_in_thread(_prepare, body, size)
        only_masked = bool(body.mask) and _inpainting_settings(body).only_masked
        start = InputImage(prepared.image, only_masked)
        control = await context.run_in_thread(build_control_options, model, units, size, start)
        strength = value_or(body.denoising_strength, 0.75)
        refiner = build_refiner_options(model, body)
        inputs = {**prepared.options, "strength": strength, **refiner, **control}
        engine_request = build_sdapi_request(model, body, options, inputs)
        return await _run_job(request, body, engine_request, options, prepared)


def _prepare(body: ImageToImageRequest, size: tuple[int, int]) -> PreparedInput:
    """The image and its mask for the model; raises ApiError 400 for what is not supported."""
    if len(body.init_images) > 1:
        message = f"{len(body.init_images)} init_images; expected exactly one"
        raise ApiError(400, message, "init_images")
    if body.resize_mode == 3:
        raise ApiError(400, "resize_mode 3 is not supported; expected 0, 1 or 2", "resize_mode")
    if body.mask and body.inpainting_fill in (2, 3):
        raise ApiError(
            400,
            f"inpainting_fill {body.inpainting_fill} is not supported; expected 0 (fill) or "
            "1 (original)",
            "inpainting_fill",
        )
    mask = decode_base64_image(body.mask) if body.mask else None
    image = decode_base64_image(body.init_images[0])
    return prepare_input(image, mask, size, body.resize_mode or 0, _inpainting_settings(body))


def _inpainting_settings(body: ImageToImageRequest) -> InpaintingSettings:
    blur = (body.mask_blur_x, body.mask_blur_y)
    if body.mask_blur is not None:
        blur = (body.mask_blur, body.mask_blur)
    return InpaintingSettings(
        blur=(value_or(blur[0], 4), value_or(blur[1], 4)),
        invert=bool(body.inpainting_mask_invert),
        only_masked=value_or(body.inpaint_full_res, True),
        padding=body.inpaint_full_res_padding or 0,
        fill=not body.inpainting_fill,
    )


def _requested_size(model: LoadedModel, body: TextToImageRequest) -> tuple[int, int]:
    width, height = model.pipe.manifest.sizes[0]
    return body.width or width, body.height or height


def build_sdapi_request(
    model: LoadedModel,
    body: TextToImageRequest,
    options: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> EngineRequest:
    """Convert a request body.

    Args:
        model: The model to use.
        body: The validated body.
        options: A1111's options for this request.
        inputs: Generation options of img2img, image, mask_image and strength; or of a second pass.

    Raises:
        ApiError: 400 for an unknown sampler.
    """
    width, height = _requested_size(model, body)
    generation = {
        "negative_prompt": body.negative_prompt or "",
        "num_inference_steps": value_or(body.steps, 20),
        "guidance_scale": value_or(body.cfg_scale, 7.0),
        "seed": None if body.seed in (None, -1) else body.seed,
        "rng": RNG[str(options["randn_source"]).casefold()],
        "num_images_per_prompt": value_or(body.batch_size, 1) * value_or(body.n_iter, 1),
        "size": f"{width}x{height}",
        "clip_skip": options["CLIP_stop_at_last_layers"] - 1,
        **inputs,
    }
    sampler = body.sampler_name or body.sampler_index
    config = resolve_scheduler_config(model.pipe, sampler, body.scheduler, body.eta)
    return EngineRequest(model, body.prompt or "", generation, config)


@dataclass(slots=True, eq=False)
class SdapiJob:
    """A running request.

    Attributes:
        owner: The index of the API key that it came with.
        request: What it generates.
        handles: Its images in the engine.
        steps: The last two steps of its first image.
        started: Monotonic time.
        interrupted: Whether a client has interrupted it.
    """

    owner: int | None
    request: EngineRequest
    handles: Sequence[RequestHandle] = ()
    steps: list[Step] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    interrupted: bool = False


@dataclass(slots=True)
class JobRegistry:
    """The running requests of these endpoints, oldest first."""

    running: list[SdapiJob] = field(default_factory=list)

    def owned_by(self, owner: int | None) -> list[SdapiJob]:
        return [job for job in self.running if job.owner == owner]


def _get_jobs(request: Request) -> JobRegistry:
    jobs: JobRegistry = request.app.state.jobs
    return jobs


async def _run_job(
    request: Request,
    body: TextToImageRequest,
    engine_request: EngineRequest,
    options: Mapping[str, Any],
    prepared: PreparedInput | None,
) -> Response:
    """Generate the images; `prepared` is the input of img2img."""
    context, running = get_context(request), _get_jobs(request).running
    job = SdapiJob(request.state.owner, engine_request)
    image_job = await context.submit(engine_request, owner=get_owner(request), steps=True)
    if body.override_settings_restore_afterwards is False:
        changed = check_options(body.override_settings or {}, context.models)
        store_options(context, get_server_options(request), changed)
    job.handles = image_job.handles
    running.append(job)
    try:
        images = await _collect_images(image_job, job, request)
    finally:
        running.remove(job)
    if prepared is not None:
        images = await context.run_in_thread(
            lambda: [_finish_image(image, prepared) for image in images]
        )
    return await context.encode_in_thread(_images_response, body, engine_request, options, images)


def _finish_image(generated: GeneratedImage, prepared: PreparedInput) -> GeneratedImage:
    extra = "".join(f", {name}: {value}" for name, value in prepared.infotext.items())
    image = prepared.finish(generated.image)
    return replace(generated, image=image, parameters=generated.parameters + extra)


async def _collect_images(
    image_job: ImageJob, job: SdapiJob, request: Request
) -> list[GeneratedImage]:
    """All images; of an interrupted job those that were finished."""
    async with contextlib.aclosing(image_job.events(request.receive)) as events:
        async for handle, step in events:
            if step is not None and handle is image_job.handles[0]:
                job.steps = [*job.steps[-1:], step]
    images = []
    for handle in image_job.handles:
        try:
            images.append(handle.future.result())
        except RequestCancelled:
            if not job.interrupted:
                raise
    return images


def _images_response(
    body: TextToImageRequest,
    engine_request: EngineRequest,
    options: Mapping[str, Any],
    images: Sequence[GeneratedImage],
) -> Response:
    image_format = FORMATS[str(options["samples_format"]).casefold()]
    quality = options["jpeg_quality"]
    encoded = [
        encode_base64_image(item.image, item.parameters, image_format, quality)
        for item in images
        if body.send_images is not False
    ]
    parameters = body.model_dump()
    if isinstance(body, ImageToImageRequest) and not body.include_init_images:
        parameters |= {"init_images": None, "mask": None}
    info = json.dumps(_info(engine_request, images))
    return json_response({"images": encoded, "parameters": parameters, "info": info})


def _info(request: EngineRequest, images: Sequence[GeneratedImage]) -> dict[str, Any]:
    assert not isinstance(request.scheduler, str)
    seeds, options = [item.seed for item in images], request.options
    width, height = request.size.split("x")
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(images),
        "negative_prompt": options["negative_prompt"],
        "all_negative_prompts": [options["negative_prompt"]] * len(images),
        "seed": seeds[0] if seeds else -1,
        "all_seeds": seeds,
        "width": int(width),
        "height": int(height),
        "sampler_name": sampler_title(request.scheduler or request.model.pipe.scheduler_config),
        "cfg_scale": options["guidance_scale"],
        "steps": options["num_inference_steps"],
        "batch_size": len(images),
        "sd_model_name": request.model.name,
        "denoising_strength": options.get("strength", options.get("hires_strength")),
        "index_of_first_image": 0,
        "infotexts": [item.parameters for item in images],
        "clip_skip": options["clip_skip"] + 1,
    }


@router.get("/progress")
async def progress(request: Request, skip_current_image: bool = False) -> Response:
    """The progress of the oldest running request of these endpoints."""
    context, running = get_context(request), _get_jobs(request).owned_by(request.state.owner)
    if not running:
        return json_response(_progress(0.0, 0.0, _state(None, 0, 0), None))
    job = running[0]
    total = sum(handle.num_evaluations for handle in job.handles)
    done = sum(handle.evaluations_done for handle in job.handles)
    spent = time.monotonic() - job.started
    image = None
    if job.steps and not skip_current_image:
        image = await context.run_in_thread(_encode_preview, job.request, list(job.steps))
    eta = spent * (total - done) / done if done else 0.0
    return json_response(_progress(done / total, eta, _state(job, done, total), image))


def _progress(fraction: float, eta: float, state: Any, image: str | None) -> dict[str, Any]:
    progress = {"progress": round(fraction, 4), "eta_relative": round(eta, 3), "state": state}
    return progress | {"current_image": image, "textinfo": None}


def _state(job: SdapiJob | None, done: int, total: int) -> dict[str, Any]:
    finished = [handle.future.done() for handle in job.handles] if job else []
    return {
        "skipped": False,
        "interrupted": bool(job and job.interrupted),
        "stopping_generation": False,
        "job": "txt2img" if job else "",
        "job_count": len(finished),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "job_no": sum(finished),
        "sampling_step": done,
        "sampling_steps": total,
    }


def _encode_preview(request: EngineRequest, steps: Sequence[Step]) -> str:
    preview = Preview(request.model.pipe.manifest.preview)
    return encode_base64_image(enlarge_preview([preview.image(step) for step in steps][-1]))


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(request: Request) -> Response:
    """Cancel every running request of these endpoints with the same API key."""
    for job in _get_jobs(request).owned_by(request.state.owner):
        job.interrupted = True
        for handle in job.handles:
            handle.cancel()
    return json_response({})


@router.post("/png-info")
async def png_info(request: Request, body: PngInfoRequest) -> Response:
    """The text in an image file, raw and parsed."""
    text = await get_context(request).run_in_thread(_read_text, body.image)
    items = {"parameters": text} if text else {}
    parts = parse_parameters(text) if text else {}
    return json_response({"info": text, "items": items, "parameters": parts})


def _read_text(image: str) -> str:
    return read_parameters(decode_base64_image(image))
