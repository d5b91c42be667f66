"""What all endpoints of one server share, and the way of a request from its fields to tickets."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from sdrt.bundle import parse_size
from sdrt.errors import UsageError

from .errors import Problem
from .job import Watch
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

    async def submit(self, call: Call, *, steps: bool = False) -> Watch:
        """Tickets for a call, followed; `steps` if its steps are to be heard too. Raises Problem,
        UsageError or Refused.
        """
        self._bounded(call)
        if self.settings.log_prompts:
            log.info("prompt: %r", call.prompt)
        watch = Watch()
        submitted = self.off_loop(self._submitted, call, watch if steps else None)
        watch.follow(await submitted)
        return watch

    def _submitted(self, call: Call, watch: Watch | None) -> Any:
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
        """Raise Problem 400 for more work than one request may ask for."""
        width, height = parse_size(known_size(call.size))
        multiple = call.model.pipe.manifest.multiple
        if call.size not in call.model.sizes and (width % multiple or height % multiple):
            have = ", ".join(call.model.sizes)
            raise Problem(
                400,
                f"size {call.size}; {call.model.name} makes {have} and multiples of {multiple}",
                "size",
                "invalid_value",
            )
        count, steps = call.options["num_images_per_prompt"], call.options["num_inference_steps"]
        most = self.settings.most_work // (width * height)
        if count * steps > most:
            raise Problem(
                400,
                f"{count} pictures of {call.size} in {steps} steps; "
                f"pictures times steps may be {most} at this size",
                code="too_much_work",
            )


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


class StrictRoute(APIRoute):
    """Reads JSON bodies as RFC 8259 has them: no NaN, no name twice, not endlessly deep."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            response: Response = await handler(_StrictRequest(request.scope, request.receive))
            return response

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return json.loads(
                await self.body(), object_pairs_hook=_object, parse_constant=_constant
            )
        except RecursionError:
            raise Problem(400, "JSON that is nested too deeply", code="invalid_json") from None
        except ValueError as error:
            raise Problem(400, f"no valid JSON: {error}", code="invalid_json") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise Problem(400, f"the field {name!r} comes twice", name, "invalid_json")
        made[name] = value
    return made


def _constant(name: str) -> None:
    raise Problem(400, f"{name} is no JSON number", code="invalid_json")


def known_size(text: str) -> str:
    """`WIDTHxHEIGHT` as bundles write it; raises Problem 400."""
    try:
        width, height = parse_size(text)
    except UsageError as error:
        raise Problem(400, str(error), "size", "invalid_value") from None
    return f"{width}x{height}"
