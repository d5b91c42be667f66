"""What all endpoints of one server share, and the way of a request from its fields to tickets."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from sdrt.bundle import parse_size
from sdrt.errors import UsageError

from .errors import ApiError
from .job import ImageJob
from .metrics import Metrics
from .model_manager import Model, Models
from .settings import Settings

log = logging.getLogger("sdrt.serve")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One request in the engine's terms; `options` are `runtime.options.Options` by name."""

    model: Model
    prompt: str
    options: Mapping[str, Any]
    scheduler: str | Mapping[str, Any] | None = None
    priority: int = 0
    deadline: float | None = None
    loras: Mapping[str, float] | None = None

    @property
    def size(self) -> str:
        return self.options["size"] or self.model.sizes[0]


@dataclass(frozen=True, slots=True)
class Context:
    """
    pool: threads for what would hold up the event loop: files of pictures, tables of samplers
    """

    settings: Settings
    models: Models
    metrics: Metrics
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "sdrt-serve"))

    async def off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    async def submit(self, call: Call, *, steps: bool = False) -> ImageJob:
        """Handles of a call, followed; `steps` if its steps are to be heard too. Raises ApiError,
        UsageError or RequestRejected.
        """
        self._bounded(call)
        if self.settings.log_prompts:
            log.info("prompt: %r", call.prompt)
        watch = ImageJob()
        submitted = self.off_loop(self._submitted, call, watch if steps else None)
        watch.follow(await submitted)
        return watch

    def _submitted(self, call: Call, watch: ImageJob | None) -> Any:
        return call.model.engine.submit(
            call.prompt,
            call.options,
            scheduler=call.scheduler,
            priority=call.priority,
            deadline=call.deadline,
            on_step=watch.on_step if watch else None,
            loras=call.loras,
        )

    def _bounded(self, call: Call) -> None:
        """Raise ApiError 400 for more work than one request may ask for."""
        width, height = parse_size(known_size(call.size))
        multiple = call.model.pipe.manifest.multiple
        if call.size not in call.model.sizes and (width % multiple or height % multiple):
            have = ", ".join(call.model.sizes)
            raise ApiError(
                400,
                f"size {call.size}; {call.model.name} makes {have} and multiples of {multiple}",
                "size",
                "invalid_value",
            )
        count, steps = call.options["num_images_per_prompt"], call.options["num_inference_steps"]
        most = self.settings.most_work // (width * height)
        if count * steps > most:
            raise ApiError(
                400,
                f"{count} pictures of {call.size} in {steps} steps; "
                f"pictures times steps may be {most} at this size",
                code="too_much_work",
            )


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


def known_size(text: str) -> str:
    """`WIDTHxHEIGHT` as bundles write it; raises ApiError 400."""
    try:
        width, height = parse_size(text)
    except UsageError as error:
        raise ApiError(400, str(error), "size", "invalid_value") from None
    return f"{width}x{height}"
