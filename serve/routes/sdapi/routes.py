"""The `/sdapi/v1` endpoints that make images, under the field names that their many clients use.

What they send and this server does not support is in `sdapi.fields`.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from sdrt.runtime import Preview, Step
from sdrt.runtime.batching.request import GeneratedImage, RequestCancelled, RequestHandle
from sdrt.runtime.images import settings_from_text, text_of
from sdrt.runtime.samplers.registry import title_of
from sdrt.serve.dependencies import Call, context_of
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.image_encoding import base64_from_image, enlarged, image_from_base64
from sdrt.serve.job import ImageJob
from sdrt.serve.model_manager import Model
from sdrt.serve.schemas import ImageToImage, PngInfo, TextToImage
from sdrt.serve.strict_json import StrictRoute

from .fields import IGNORED, IMAGE_ONLY, check_fields
from .inpainting import Given, Inpainting, given_from
from .options import FORMATS, RNG, checked, keep, options_with, server_options
from .sampling import configuration

router = APIRouter(prefix="/sdapi/v1", route_class=StrictRoute)
T = TypeVar("T")


@router.post("/txt2img")
async def txt2img(request: Request, body: TextToImage) -> Response:
    """Images of a prompt."""
    check_fields(body.model_extra or {}, IGNORED | IMAGE_ONLY)
    options = options_with(request, body.override_settings)
    found = context_of(request).models.named(options["sd_model_checkpoint"])
    return await _answer(request, body, call_from(found, body, options, {}), options, None)


@router.post("/img2img")
async def img2img(request: Request, body: ImageToImage) -> Response:
    """Images of a prompt that start from an image."""
    check_fields(body.model_extra or {}, IGNORED)
    context, options = context_of(request), options_with(request, body.override_settings)
    found = context.models.named(options["sd_model_checkpoint"])
    given = await context.off_loop(_given, body, _size(found, body))
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    call = call_from(found, body, options, {**given.options, "strength": strength})
    return await _answer(request, body, call, options, given)


def _given(body: ImageToImage, size: tuple[int, int]) -> Given:
    """The image and its mask for the model; raises ApiError 400 for what is not supported."""
    if len(body.init_images) > 1:
        raise ApiError(400, f"{len(body.init_images)} init_images; one is taken", "init_images")
    if body.resize_mode == 3:
        raise ApiError(400, "resize_mode 3 is not supported; expected 0, 1 or 2", "resize_mode")
    if body.mask and body.inpainting_fill in (2, 3):
        raise ApiError(
            400,
            f"inpainting_fill {body.inpainting_fill} is not supported; expected 0 (fill) or "
            "1 (original)",
            "inpainting_fill",
        )
    mask = image_from_base64(body.mask) if body.mask else None
    image = image_from_base64(body.init_images[0])
    return given_from(image, mask, size, body.resize_mode or 0, _inpainting(body))


def _inpainting(body: ImageToImage) -> Inpainting:
    blur = (body.mask_blur_x, body.mask_blur_y)
    if body.mask_blur is not None:
        blur = (body.mask_blur, body.mask_blur)
    return Inpainting(
        blur=(_or(blur[0], 4), _or(blur[1], 4)),
        invert=bool(body.inpainting_mask_invert),
        cropped=_or(body.inpaint_full_res, True),
        padding=body.inpaint_full_res_padding or 0,
        filled=not body.inpainting_fill,
    )


def _size(found: Model, body: TextToImage) -> tuple[int, int]:
    width, height = found.pipe.manifest.sizes[0]
    return body.width or width, body.height or height


def call_from(
    found: Model, body: TextToImage, options: Mapping[str, Any], given: Mapping[str, Any]
) -> Call:
    """The request in the engine's terms; raises ApiError 400 for a sampler that is not known."""
    width, height = _size(found, body)
    wanted = {
        "negative_prompt": body.negative_prompt or "",
        "num_inference_steps": _or(body.steps, 20),
        "guidance_scale": _or(body.cfg_scale, 7.0),
        "seed": None if body.seed in (None, -1) else body.seed,
        "rng": RNG[str(options["randn_source"]).casefold()],
        "num_images_per_prompt": _or(body.batch_size, 1) * _or(body.n_iter, 1),
        "size": f"{width}x{height}",
        "clip_skip": options["CLIP_stop_at_last_layers"] - 1,
        **given,
    }
    sampler = body.sampler_name or body.sampler_index
    config = configuration(found.pipe, sampler, body.scheduler, body.eta)
    return Call(found, body.prompt or "", wanted, config)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


@dataclass(slots=True, eq=False)
class Job:
    """One running request. owner: whose key it came with; steps: its first picture's last two."""

    owner: int | None
    call: Call
    tickets: Sequence[RequestHandle] = ()
    steps: list[Step] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    interrupted: bool = False


@dataclass(slots=True)
class Jobs:
    """The running requests of these endpoints, oldest first."""

    running: list[Job] = field(default_factory=list)

    def of(self, owner: int | None) -> list[Job]:
        return [job for job in self.running if job.owner == owner]


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


async def _answer(
    request: Request,
    body: TextToImage,
    call: Call,
    options: Mapping[str, Any],
    given: Given | None,
) -> Response:
    """given: what the images start from"""
    context, jobs = context_of(request), _jobs(request).running
    job = Job(request.state.owner, call)
    watch = await context.submit(call, steps=True)
    if body.override_settings_restore_afterwards is False:
        kept = server_options(request)
        keep(context, kept, checked(body.override_settings or {}, context.models))
    job.tickets = watch.tickets
    jobs.append(job)
    try:
        made = await _made(watch, job, request)
    finally:
        jobs.remove(job)
    if given is not None:
        made = await context.off_loop(lambda: [_finished(one, given) for one in made])
    return await context.off_loop(_response, body, call, options, made)


def _finished(made: GeneratedImage, given: Given) -> GeneratedImage:
    text = made.parameters + "".join(f", {name}: {value}" for name, value in given.settings.items())
    return replace(made, image=given.finish(made.image), parameters=text)


async def _made(watch: ImageJob, job: Job, request: Request) -> list[GeneratedImage]:
    """All pictures; of an interrupted job those that were finished."""
    async with contextlib.aclosing(watch.events(request.receive)) as events:
        async for ticket, step in events:
            if step is not None and ticket is watch.tickets[0]:
                job.steps = [*job.steps[-1:], step]
    made = []
    for ticket in watch.tickets:
        try:
            made.append(ticket.future.result())
        except RequestCancelled:
            if not job.interrupted:
                raise
    return made


def _response(
    body: TextToImage, call: Call, options: Mapping[str, Any], made: Sequence[GeneratedImage]
) -> Response:
    kind = FORMATS[str(options["samples_format"]).casefold()]
    quality = options["jpeg_quality"]
    images = [
        base64_from_image(one.image, one.parameters, kind, quality)
        for one in made
        if body.send_images is not False
    ]
    sent = body.model_dump()
    if isinstance(body, ImageToImage) and not body.include_init_images:
        sent |= {"init_images": None, "mask": None}
    return json_response(
        {"images": images, "parameters": sent, "info": json.dumps(_info(call, made))}
    )


def _info(call: Call, made: Sequence[GeneratedImage]) -> dict[str, Any]:
    assert not isinstance(call.scheduler, str)
    seeds, options = [one.seed for one in made], call.options
    width, height = call.size.split("x")
    return {
        "prompt": call.prompt,
        "all_prompts": [call.prompt] * len(made),
        "negative_prompt": options["negative_prompt"],
        "all_negative_prompts": [options["negative_prompt"]] * len(made),
        "seed": seeds[0] if seeds else -1,
        "all_seeds": seeds,
        "width": int(width),
        "height": int(height),
        "sampler_name": title_of(call.scheduler or call.model.pipe.scheduler_config),
        "cfg_scale": options["guidance_scale"],
        "steps": options["num_inference_steps"],
        "batch_size": len(made),
        "sd_model_name": call.model.name,
        "denoising_strength": options.get("strength"),
        "index_of_first_image": 0,
        "infotexts": [one.parameters for one in made],
        "clip_skip": options["clip_skip"] + 1,
    }


@router.get("/progress")
async def progress(request: Request, skip_current_image: bool = False) -> Response:
    """How far the oldest running request of these endpoints is."""
    context, running = context_of(request), _jobs(request).of(request.state.owner)
    if not running:
        return json_response(_progress(0.0, 0.0, _state(None, 0, 0), None))
    job = running[0]
    total = sum(ticket.evaluations for ticket in job.tickets)
    done = sum(ticket.done_evaluations for ticket in job.tickets)
    spent = time.monotonic() - job.began
    image = None
    if job.steps and not skip_current_image:
        image = await context.off_loop(_preview, job.call, list(job.steps))
    eta = spent * (total - done) / done if done else 0.0
    return json_response(_progress(done / total, eta, _state(job, done, total), image))


def _progress(share: float, eta: float, state: Any, image: str | None) -> dict[str, Any]:
    told = {"progress": round(share, 4), "eta_relative": round(eta, 3), "state": state}
    return told | {"current_image": image, "textinfo": None}


def _state(job: Job | None, done: int, total: int) -> dict[str, Any]:
    finished = [ticket.future.done() for ticket in job.tickets] if job else []
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


def _preview(call: Call, steps: Sequence[Step]) -> str:
    preview = Preview(call.model.pipe.manifest.preview)
    return base64_from_image(enlarged([preview.image(step) for step in steps][-1]))


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(request: Request) -> Response:
    """End every running request of these endpoints that came with the same key."""
    for job in _jobs(request).of(request.state.owner):
        job.interrupted = True
        for ticket in job.tickets:
            ticket.cancel()
    return json_response({})


@router.post("/png-info")
async def png_info(request: Request, body: PngInfo) -> Response:
    """The text that a picture's file carries, whole and taken apart."""
    text = await context_of(request).off_loop(_text, body.image)
    items = {"parameters": text} if text else {}
    parts = settings_from_text(text) if text else {}
    return json_response({"info": text, "items": items, "parameters": parts})


def _text(image: str) -> str:
    return text_of(image_from_base64(image))
