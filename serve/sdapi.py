"""The `/sdapi/v1` endpoints under the field names that their many clients use.

Fields they know and this server does not are passed over, as those clients send them all.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import Response

from sdrt.runtime import Preview, Step
from sdrt.runtime.pictures import settings_from_text, text_of
from sdrt.runtime.samplers.catalogue import LEVELS, SAMPLERS, titles
from sdrt.runtime.tickets import Cancelled, Picture, Ticket

from .context import Call, Context, StrictRoute, context_of
from .images import base64_from_image, enlarged, image_from_base64
from .models import Model
from .problem import json_response
from .requests import ImageToImage, PngInfo, TextToImage
from .watch import Watch

router = APIRouter(prefix="/sdapi/v1", route_class=StrictRoute)

PLAIN = ("", "automatic", "uniform", "normal")


@router.post("/txt2img")
async def txt2img(request: Request, body: TextToImage) -> Response:
    """Pictures of a prompt."""
    found = _model(context_of(request), body)
    return await _answer(request, body, _call(found, body, {}))


@router.post("/img2img")
async def img2img(request: Request, body: ImageToImage) -> Response:
    """Pictures of a prompt that start from a picture."""
    context = context_of(request)
    found = _model(context, body)
    given = await context.off_loop(_given, body)
    return await _answer(request, body, _call(found, body, given))


def _given(body: ImageToImage) -> dict[str, Any]:
    image = image_from_base64(body.init_images[0])
    mask = image_from_base64(body.mask).convert("L") if body.mask else None
    if mask and body.inpainting_mask_invert:
        mask = mask.point(lambda value: 255 - value)
    if mask and mask.size != image.size:
        mask = mask.resize(image.size, Image.Resampling.NEAREST)
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    return {"image": image, "mask_image": mask, "strength": strength}


def _model(context: Context, body: TextToImage) -> Model:
    named = (body.override_settings or {}).get("sd_model_checkpoint")
    return context.models.named(str(named) if named else None)


def _call(found: Model, body: TextToImage, given: Mapping[str, Any]) -> Call:
    width, height = found.pipe.manifest.sizes[0]
    counts = (1 if count is None else count for count in (body.batch_size, body.n_iter))
    skip = (body.override_settings or {}).get("CLIP_stop_at_last_layers") or 1
    options = {
        "negative_prompt": body.negative_prompt or "",
        "num_inference_steps": 20 if body.steps is None else body.steps,
        "guidance_scale": 7.0 if body.cfg_scale is None else body.cfg_scale,
        "seed": None if body.seed in (None, -1) else body.seed,
        "num_images_per_prompt": next(counts) * next(counts),
        "size": f"{body.width or width}x{body.height or height}",
        "clip_skip": skip - 1 if isinstance(skip, int) else skip,
        **given,
    }
    return Call(found, body.prompt or "", options, _scheduler(body))


def _scheduler(body: TextToImage) -> str | None:
    """`DPM++ 2M` and `Karras` are sent apart or as one name."""
    name, law = body.sampler_name or body.sampler_index, (body.scheduler or "").strip()
    if not name or law.lower() in PLAIN or name.lower().endswith(law.lower()):
        return name or None
    return f"{name} {law}"


@dataclass(slots=True, eq=False)
class Job:
    """One running request. owner: whose key it came with; steps: its first picture's last two."""

    owner: int | None
    call: Call
    tickets: Sequence[Ticket] = ()
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


async def _answer(request: Request, body: TextToImage, call: Call) -> Response:
    context, jobs = context_of(request), _jobs(request).running
    job = Job(request.state.owner, call)
    watch = await context.submit(call, steps=True)
    job.tickets = watch.tickets
    jobs.append(job)
    try:
        made = await _made(watch, job, request)
    finally:
        jobs.remove(job)
    return await context.off_loop(_response, body, call, made)


async def _made(watch: Watch, job: Job, request: Request) -> list[Picture]:
    """All pictures; of an interrupted job those that were finished."""
    async with contextlib.aclosing(watch.events(request.receive)) as events:
        async for ticket, step in events:
            if step is not None and ticket is watch.tickets[0]:
                job.steps = [*job.steps[-1:], step]
    made = []
    for ticket in watch.tickets:
        try:
            made.append(ticket.future.result())
        except Cancelled:
            if not job.interrupted:
                raise
    return made


def _response(body: TextToImage, call: Call, made: Sequence[Picture]) -> Response:
    images = [base64_from_image(one.image, one.parameters) for one in made if body.send_images]
    if isinstance(body, ImageToImage) and body.include_init_images:
        images += body.init_images
    info = json.dumps(_info(call, made))
    return json_response({"images": images, "parameters": body.model_dump(), "info": info})


def _info(call: Call, made: Sequence[Picture]) -> dict[str, Any]:
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
        "sampler_name": call.scheduler,
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


@router.get("/samplers")
async def samplers() -> Response:
    """Every name that `sampler_name` takes."""
    named = [
        {"name": f"{title} {law}".strip(), "aliases": [] if law else [kind], "options": {}}
        for title, (kind, _) in titles().items()
        for law in ("", *(law for law, key in LEVELS.items() if key in SAMPLERS[kind].reads))
    ]
    return json_response(named)


@router.get("/schedulers")
async def schedulers() -> Response:
    """What `scheduler` takes beside a `sampler_name`."""
    return json_response(
        [{"name": law.lower(), "label": law, "aliases": None} for law in ("Automatic", *LEVELS)]
    )


@router.get("/sd-models")
async def sd_models(request: Request) -> Response:
    """The models of this server."""
    none = {"hash": None, "sha256": None, "config": None}
    return json_response(
        [
            {"title": name, "model_name": name, "filename": name, **none}
            for name in context_of(request).models.sources
        ]
    )


@router.get("/options")
async def options(request: Request) -> Response:
    """What clients read before they ask: the model. Nothing can be set for all."""
    sources = context_of(request).models.sources
    shared = {"samples_format": "png", "CLIP_stop_at_last_layers": 1}
    return json_response({"sd_model_checkpoint": next(iter(sources)), **shared})


@router.post("/png-info")
async def png_info(request: Request, body: PngInfo) -> Response:
    """The text that a picture's file carries, whole and taken apart."""
    text = await context_of(request).off_loop(_text, body.image)
    items = {"parameters": text} if text else {}
    parts = settings_from_text(text) if text else {}
    return json_response({"info": text, "items": items, "parameters": parts})


def _text(image: str) -> str:
    return text_of(image_from_base64(image))
