"""One OpenAI request to make or edit pictures: its call of the engine, its answer, its events."""

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from PIL.Image import Image
from starlette.responses import Response

from sdrt.runtime import Preview, Step
from sdrt.runtime.batching.request import GeneratedImage, RequestHandle
from sdrt.runtime.safety_checker import FLAT, is_flat

from .dependencies import Call, Context, context_of, known_size
from .errors import ApiError, json_response
from .image_encoding import base64_from_image, enlarged
from .job import ImageJob, failure_of
from .model_manager import Model
from .schemas import Generation
from .sse import EventStream, event_bytes

PULSE_SECONDS, QUIET_SECONDS = 0.5, 15.0
NOTHING_NEW = b":\n\n"  # a comment, so that no proxy takes the stream for dead
T = TypeVar("T")


def call_from(found: Model, body: Generation, given: Mapping[str, Any]) -> Call:
    """The request in the engine's terms, `given` what came as files; raises ApiError 400 for fields
    that do not go together.
    """
    if body.response_format == "url":
        raise ApiError(
            400, "pictures are not kept, so they have no url; use b64_json", "response_format"
        )
    if not body.stream and (body.partial_images or body.progress):
        raise ApiError(400, "partial_images and progress need stream: true", "stream")
    if body.output_compression is not None and body.output_format in (None, "png"):
        raise ApiError(400, "png has no quality; use jpeg or webp", "output_compression")
    options = {
        "negative_prompt": body.negative_prompt or "",
        "num_inference_steps": _or(body.num_inference_steps, 20),
        "guidance_scale": _or(body.guidance_scale, 7.5),
        "feature_reuse": _or(body.feature_reuse, 1),
        "seed": body.seed,
        "num_images_per_prompt": _or(body.n, 1),
        "size": None if body.size in (None, "auto") else known_size(str(body.size)),
        **given,
    }
    priority = _or(body.priority, 0)
    return Call(
        *(found, body.prompt, options, body.scheduler, priority, body.deadline_seconds),
        loras=body.loras,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


async def answer(request: Request, body: Generation, call: Call, kind: str) -> Response:
    """Pictures, or the stream of them; `kind` begins the names of its events."""
    context = context_of(request)
    heard = bool(body.partial_images or body.progress)
    watch = await context.submit(call, steps=heard)
    if body.stream:
        return EventStream(_Telling(context, watch, body, call, kind).events(request))
    made = await watch.pictures(request.receive)
    return await context.off_loop(_response, made, body, call)


def _response(made: Sequence[GeneratedImage], body: Generation, call: Call) -> Response:
    data = [
        {"b64_json": _file(one.image, body, one.parameters), "seed": one.seed, **_warned(one.image)}
        for one in made
    ]
    return json_response({"created": int(time.time()), "data": data, **_shared(body, call)})


def _warned(image: Image) -> dict[str, str]:
    """What is said of a picture beside it, where there is anything to say."""
    return {"warning": FLAT} if is_flat(image) else {}


def _file(image: Image, body: Generation, parameters: str = "") -> str:
    kind = (body.output_format or "png").upper()
    return base64_from_image(image, parameters, kind, _or(body.output_compression, 100))


def _shared(body: Generation, call: Call) -> dict[str, Any]:
    """What every answer says of a picture."""
    return {
        "size": call.size,
        "output_format": body.output_format or "png",
        "background": "opaque",
        "quality": body.quality if body.quality in ("low", "medium", "high") else "auto",
    }


class _Telling:
    """The events of one stream."""

    def __init__(
        self, context: Context, watch: ImageJob, body: Generation, call: Call, kind: str
    ) -> None:
        self.context, self.watch, self.body, self.call, self.kind = context, watch, body, call, kind
        projection = call.model.pipe.manifest.preview
        self.previews = {ticket: Preview(projection) for ticket in watch.tickets}
        self.shown = dict.fromkeys(watch.tickets, 0)
        self.positions: dict[RequestHandle, int] = {}

    async def events(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Every picture's way. A failure is raised, which cancels the others."""
        for event in self._queued():
            yield event
        pulse = PULSE_SECONDS if self.body.progress else QUIET_SECONDS
        async with contextlib.aclosing(self.watch.events(request.receive, pulse)) as heard:
            async for ticket, step in heard:
                if ticket is None:
                    told = list(self._queued()) or [NOTHING_NEW]
                elif step is None:
                    told = [await self.context.off_loop(self._completed, ticket)]
                else:
                    told = await self.context.off_loop(self._stepped, ticket, step)
                for event in told:
                    yield event

    def _event(self, what: str, ticket: RequestHandle, **fields: Any) -> bytes:
        index = self.watch.tickets.index(ticket)
        return event_bytes(f"{self.kind}.{what}", {"index": index, **fields})

    def _queued(self) -> Iterator[bytes]:
        """How many pictures wait before each that waits, where that has changed."""
        if not self.body.progress:
            return
        waiting = [t for t in self.call.model.engine.tickets() if t.state == "waiting"]
        for position, ticket in enumerate(waiting):
            if ticket in self.previews and self.positions.get(ticket) != position:
                self.positions[ticket] = position
                yield self._event("queued", ticket, position=position)

    def _stepped(self, ticket: RequestHandle, step: Step) -> list[bytes]:
        told = []
        if self.body.progress:
            told.append(self._event("progress", ticket, step=step.index, total=step.total))
        wanted, shown = self.body.partial_images or 0, self.shown[ticket]
        # Evenly over the run, none after its last evaluation: that is the picture itself.
        if wanted and step.index < step.total:
            small = self.previews[ticket].image(step)
            if step.index * (wanted + 1) >= (shown + 1) * step.total:
                self.shown[ticket] += 1
                told.append(self._pictured("partial_image", ticket, enlarged(small), "", shown))
        return told

    def _completed(self, ticket: RequestHandle) -> bytes:
        if error := failure_of(ticket):
            raise error
        picture = ticket.future.result()
        return self._pictured("completed", ticket, picture.image, picture.parameters)

    def _pictured(
        self, what: str, ticket: RequestHandle, image: Image, text: str, partial: int | None = None
    ) -> bytes:
        fields = _shared(self.body, self.call) | {"created_at": int(time.time())}
        if partial is not None:
            fields["partial_image_index"] = partial
        else:
            fields |= {"seed": ticket.request.seed, **_warned(image)}
        return self._event(what, ticket, b64_json=_file(image, self.body, text), **fields)
