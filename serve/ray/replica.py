"""The replica deployment: the application of a single server, called by the ingress, whose models
are loaded on first use.

Knows Ray Serve; not how many replicas there are, nor how requests are routed to them.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Message, Scope

from sdrt.errors import BackendError
from sdrt.serve.app import create_app
from sdrt.serve.errors import api_error_from_exception
from sdrt.serve.model_manager import ModelManager, ModelSource
from sdrt.serve.settings import Settings

Headers = list[tuple[bytes, bytes]]
ReplicaResponse = tuple[int, Headers, bytes]  # status, headers, body


class Replica:
    """The Ray Serve deployment that generates images. It starts with the first model loaded."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, sources: Mapping[str, ModelSource], settings: Settings, max_models: int
    ) -> None:
        """most_models: that are loaded at one time; the least recently used makes room"""
        self.app, self.models = create_app(sources, settings)
        self.models.on_demand = True
        self.ensure_loaded = _multiplex(self.models, max_models)
        await self.ensure_loaded(next(iter(sources)))

    async def forward(
        self, scope: Scope, body: bytes, lora_tags: str | None
    ) -> AsyncGenerator[Message, None]:
        """Load the model that Ray routed the request by, and yield the ASGI messages of the
        response. Ray cancels the call when the client disconnects. `lora_tags` is the router's.
        """
        app: ASGIApp = self.app
        try:
            if name := serve.get_multiplexed_model_id():
                await self.ensure_loaded(name)
        except Exception as error:
            app = api_error_from_exception(error).response(scope["path"])
        async for message in stream_messages(app, scope, body):
            yield message

    async def respond(self, scope: Scope, body: bytes) -> tuple[str, ReplicaResponse]:
        """This replica's name and its complete response, without loading a model."""
        status, headers, parts = 500, Headers(), []
        async for message in stream_messages(self.app, scope, body):
            status = message.get("status", status)
            headers = message.get("headers", headers)
            parts.append(message.get("body", b""))
        return serve.get_replica_context().replica_tag, (status, headers, b"".join(parts))

    def check_health(self) -> None:
        """Raise BackendError if an engine is broken; Ray then replaces the replica."""
        for name, state in self.models.states.items():
            if state in ("broken", "lost"):
                raise BackendError(f"the engine of model {name} is {state}")

    def __del__(self) -> None:
        """Called by Ray after draining."""
        if hasattr(self, "models"):
            self.models.close()


class _MultiplexedModel:
    """A loaded model as Ray multiplexes it: `__del__` is called to unload it."""

    def __init__(self, models: ModelManager, name: str) -> None:
        self.models, self.name = models, name

    def __del__(self) -> None:
        self.models.unload(self.name)


def _multiplex(
    models: ModelManager, max_models: int
) -> Callable[[str], Awaitable[_MultiplexedModel]]:
    """A function that loads a model unless it is loaded; Ray routes requests by it."""

    async def load(name: str) -> _MultiplexedModel:
        await asyncio.to_thread(models.load_model, name)
        return _MultiplexedModel(models, name)

    multiplexed: Any = serve.multiplexed(load, max_num_models_per_replica=max_models)
    return multiplexed  # type: ignore[no-any-return]


async def stream_messages(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """Yield the ASGI messages of a response. Closing the generator disconnects the client as the
    application sees it, and waits for the application.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    request = [{"type": "http.request", "body": body, "more_body": False}]
    disconnected = asyncio.Event()

    async def receive() -> Message:
        if request:
            return request.pop()
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app({**scope, "state": {}}, receive, sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
    finally:
        disconnected.set()
        await task
