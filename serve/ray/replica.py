"""One replica of a fleet: the application of a single server, asked by the front instead of by
clients, whose engines are loaded when they are first asked for.

Knows Ray Serve; not how many replicas there are, nor which of them is asked.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Message, Scope

from sdrt.errors import BackendError
from sdrt.serve.app import application
from sdrt.serve.errors import problem_from
from sdrt.serve.model_manager import Models, Source
from sdrt.serve.settings import Settings

Headers = list[tuple[bytes, bytes]]
Answer = tuple[int, Headers, bytes]  # with the status first, the body last


class Replica:
    """A Ray Serve deployment. It begins with the first model loaded."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, sources: Mapping[str, Source], settings: Settings, most_models: int
    ) -> None:
        """most_models: that are loaded at one time; the least recently used makes room"""
        self.app, self.models = application(sources, settings)
        self.models.on_demand = True
        self.loaded = _multiplexed(self.models, most_models)
        await self.loaded(next(iter(sources)))

    async def forward(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """What the application sends for a request, once the model that Ray routed it by is loaded.
        `RequestCancelled` means that the client has gone.
        """
        app: ASGIApp = self.app
        try:
            if name := serve.get_multiplexed_model_id():
                await self.loaded(name)
        except Exception as error:
            app = problem_from(error).response(scope["path"])
        async for message in messages(app, scope, body):
            yield message

    async def answer(self, scope: Scope, body: bytes) -> tuple[str, Answer]:
        """This replica's name and the application's whole answer, whatever is loaded."""
        status, headers, parts = 500, Headers(), []
        async for message in messages(self.app, scope, body):
            status = message.get("status", status)
            headers = message.get("headers", headers)
            parts.append(message.get("body", b""))
        return serve.get_replica_context().replica_tag, (status, headers, b"".join(parts))

    def check_health(self) -> None:
        """Raises BackendError while an engine is broken; Ray replaces a replica that stays so."""
        for name, state in self.models.states.items():
            if state == "broken":
                raise BackendError(f"the engine of {name} is broken")

    def __del__(self) -> None:
        """Called by Ray once what runs has ended, or had its time."""
        if hasattr(self, "models"):
            self.models.close()


class _Loaded:
    """A model in the hands of Ray, which calls `__del__` on the one that makes room."""

    def __init__(self, models: Models, name: str) -> None:
        self.models, self.name = models, name

    def __del__(self) -> None:
        self.models.stop(self.name)


def _multiplexed(models: Models, most: int) -> Callable[[str], Awaitable[_Loaded]]:
    """Loads a model by name unless it is; Ray hears of it and routes by it."""

    async def load(name: str) -> _Loaded:
        await asyncio.to_thread(models.start, name)
        return _Loaded(models, name)

    multiplexed: Any = serve.multiplexed(load, max_num_models_per_replica=most)
    return multiplexed  # type: ignore[no-any-return]


async def messages(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """What an application sends for one request. Closed early, the application hears a client that
    is gone, and is waited for.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    asked = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if asked:
            return asked.pop()
        await gone.wait()
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
        gone.set()
        await task
