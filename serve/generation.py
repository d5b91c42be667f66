"""OpenAI image requests: conversion to an engine request, the JSON response, the event stream."""

import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from PIL.Image import Image
from starlette.responses import Response

from sdrt.runtime import Preview, Step
from sdrt.runtime.batching.request import GeneratedImage, RequestHandle
from sdrt.runtime.hires_options import HIRES_PARSERS
from sdrt.runtime.images import image_to_bytes
from sdrt.runtime.safety_checker import FLAT_WARNING, is_flat

from .dependencies import EngineRequest, ServerContext, get_context, get_owner, normalize_size
from .errors import ApiError, json_response
from .image_encoding import enlarge_preview
from .job import ImageJob, get_failure
from .model_manager import LoadedModel
from .schemas import GenerationRequest, value_or
from .sse import EventStreamResponse, format_event

PROGRESS_POLL_SECONDS, KEEPALIVE_SECONDS = 0.5, 15.0
# Options that a body has under their own names.
OPTIONAL = (
    *("preset", "feature_reuse", "feature_reuse_order", "output_reuse"),
    *("guidance_rescale", "guidance_interval", "clip_skip", "refiner_switch_at", *HIRES_PARSERS),
)
KEEPALIVE_COMMENT = b":\n\n"  # keeps proxies from closing an idle stream


def build_openai_request(
    model: LoadedModel, body: GenerationRequest, inputs: Mapping[str, Any]
) -> EngineRequest:
    """Convert a request body.

    Args:
        model: The model to use.
        body: The validated body.
        inputs: Options of its images: image, mask_image, strength, those of control.

    Raises:
        ApiError: 400 for fields that cannot be combined.
    """
    if body.response_format == "url":
        raise ApiError(
            400, "url is not supported: images are not stored; use b64_json", "response_format"
        )
    if not body.stream and (body.partial_images or body.progress):
        raise ApiError(400, "partial_images and progress require stream: true", "stream")
    if body.output_compression is not None and body.output_format in (None, "png"):
        raise ApiError(400, "png has no quality setting; use jpeg or webp", "output_compression")
    options = {
        "negative_prompt": body.negative_prompt or "",
        "num_inference_steps": value_or(body.num_inference_steps, 20),
        "guidance_scale": value_or(body.guidance_scale, 7.5),
        "seed": body.seed,
        "num_images_per_prompt": value_or(body.n, 1),
        "size": None if body.size in (None, "auto") else normalize_size(str(body.size)),
        **{name: value for name in OPTIONAL if (value := getattr(body, name)) is not None},
        **inputs,
    }
    priority = value_or(body.priority, 0)
    return EngineRequest(
        *(model, body.prompt, options, body.scheduler, priority, body.deadline_seconds),
        loras=body.loras,
    )


async def respond(
    request: Request, body: GenerationRequest, engine_request: EngineRequest, event_prefix: str
) -> Response:
    """Generate the images; respond with JSON, or with an event stream.

    `event_prefix` begins the names of its events.
    """
    context = get_context(request)
    steps = bool(body.partial_images or body.progress)
    job = await context.submit(engine_request, owner=get_owner(request), steps=steps)
    if body.stream:
        return EventStreamResponse(
            _ImageEvents(context, job, body, engine_request, event_prefix).events(request)
        )
    images = await job.wait_for_images(request.receive)
    return await context.encode_in_thread(_images_response, images, body, engine_request)


def _images_response(
    images: Sequence[GeneratedImage], body: GenerationRequest, engine_request: EngineRequest
) -> Response:
    data = [
        {
            "b64_json": _encode_image(item.image, body, item.parameters),
            "seed": item.seed,
            **_image_warning(item.image),
        }
        for item in images
    ]
    return json_response(
        {"created": int(time.time()), "data": data, **_image_metadata(body, engine_request)}
    )


def _image_warning(image: Image) -> dict[str, str]:
    """The `warning` field of an image that looks broken, else nothing."""
    return {"warning": FLAT_WARNING} if is_flat(image) else {}


def encode_image_file(image: Image, body: GenerationRequest, parameters: str = "") -> bytes:
    """An image in the format and quality that a body asks for."""
    image_format = (body.output_format or "png").upper()
    quality = value_or(body.output_compression, 100)
    return image_to_bytes(image, parameters, image_format, quality)


def _encode_image(image: Image, body: GenerationRequest, parameters: str = "") -> str:
    return base64.b64encode(encode_image_file(image, body, parameters)).decode("ascii")


def _image_metadata(body: GenerationRequest, engine_request: EngineRequest) -> dict[str, Any]:
    """The fields that responses and events share."""
    return {
        "size": engine_request.output_size,
        "output_format": body.output_format or "png",
        "background": "opaque",
        "quality": body.quality if body.quality in ("low", "medium", "high") else "auto",
    }


class _ImageEvents:
    """Writes the events of one stream."""

    def __init__(
        self,
        context: ServerContext,
        job: ImageJob,
        body: GenerationRequest,
        engine_request: EngineRequest,
        event_prefix: str,
    ) -> None:
        self.context, self.job, self.body = context, job, body
        self.engine_request, self.event_prefix = engine_request, event_prefix
        projection = engine_request.model.pipe.manifest.preview
        self.previews = {handle: Preview(projection) for handle in job.handles}
        self.preview_counts = dict.fromkeys(job.handles, 0)
        self.positions: dict[RequestHandle, int] = {}

    async def events(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Yield the events of all images. Raises the first failure, which cancels the others."""
        for event in self._queued_events():
            yield event
        timeout = PROGRESS_POLL_SECONDS if self.body.progress else KEEPALIVE_SECONDS
        async with contextlib.aclosing(self.job.events(request.receive, timeout)) as job_events:
            async for handle, step in job_events:
                if handle is None:
                    events = list(self._queued_events()) or [KEEPALIVE_COMMENT]
                elif step is None:
                    events = [await self.context.encode_in_thread(self._completed_event, handle)]
                else:
                    events = await self.context.run_in_thread(self._step_events, handle, step)
                for event in events:
                    yield event

    def _event(self, name: str, handle: RequestHandle, **fields: Any) -> bytes:
        index = self.job.handles.index(handle)
        return format_event(f"{self.event_prefix}.{name}", {"index": index, **fields})

    def _queued_events(self) -> Iterator[bytes]:
        """The queue position of each waiting image, if it has changed."""
        if not self.body.progress:
            return
        waiting = [t for t in self.engine_request.model.engine.unfinished() if t.state == "waiting"]
        for position, handle in enumerate(waiting):
            if handle in self.previews and self.positions.get(handle) != position:
                self.positions[handle] = position
                yield self._event("queued", handle, position=position)

    def _step_events(self, handle: RequestHandle, step: Step) -> list[bytes]:
        events = []
        if self.body.progress:
            events.append(self._event("progress", handle, step=step.index, total=step.total))
        count, index = self.body.partial_images or 0, self.preview_counts[handle]
        # Spread evenly over the steps; none after the last one, which yields the image itself.
        if count and step.index < step.total:
            small = self.previews[handle].image(step)
            if step.index * (count + 1) >= (index + 1) * step.total:
                self.preview_counts[handle] += 1
                preview = enlarge_preview(small)
                events.append(self._image_event("partial_image", handle, preview, "", index))
        return events

    def _completed_event(self, handle: RequestHandle) -> bytes:
        if error := get_failure(handle):
            raise error
        result = handle.future.result()
        return self._image_event("completed", handle, result.image, result.parameters)

    def _image_event(
        self, name: str, handle: RequestHandle, image: Image, text: str, partial: int | None = None
    ) -> bytes:
        fields = _image_metadata(self.body, self.engine_request) | {"created_at": int(time.time())}
        if partial is not None:
            fields["partial_image_index"] = partial
        else:
            fields |= {"seed": handle.request.seed, **_image_warning(image)}
        return self._event(name, handle, b64_json=_encode_image(image, self.body, text), **fields)
