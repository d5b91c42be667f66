"""Follows the images of one request from the event loop, until they are finished or the client
disconnects.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial

from starlette.types import Receive

from sdrt.runtime import Step
from sdrt.runtime.batching.request import GeneratedImage, RequestCancelled, RequestHandle

from .errors import ClientDisconnected

# (handle, step) after a step, (handle, None) when an image has ended, (None, None) after a timeout.
JobEvent = tuple[RequestHandle | None, Step | None]


@dataclass(slots=True)
class ImageJob:
    """Carries events from the engine's threads into the event loop in which it is created."""

    handles: Sequence[RequestHandle] = ()
    queue: asyncio.Queue[JobEvent | None] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def on_step(self, handle: RequestHandle, step: Step) -> None:
        """The engine's callback; called in its thread."""
        self._put((handle, step))

    def attach(self, handles: Sequence[RequestHandle]) -> None:
        self.handles = handles
        for handle in handles:
            handle.future.add_done_callback(partial(self._on_done, handle))

    def _on_done(self, handle: RequestHandle, _: object) -> None:
        self._put((handle, None))

    def _put(self, event: JobEvent | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def events(
        self, receive: Receive, timeout: float | None = None
    ) -> AsyncGenerator[JobEvent, None]:
        """Yield the events of all images until each has ended; cancels what is unfinished when it
        is closed.

        Args:
            receive: The connection's ASGI messages.
            timeout: Yield (None, None) after so many seconds without an event.

        Raises:
            ClientDisconnected: The client closed the connection.
        """
        disconnected = asyncio.create_task(self._wait_for_disconnect(receive))
        unfinished = len(self.handles)
        try:
            while unfinished:
                try:
                    async with asyncio.timeout(timeout):
                        event = await self.queue.get()
                except TimeoutError:
                    event = None, None
                if event is None:
                    raise ClientDisconnected
                yield event
                unfinished -= event[0] is not None and event[1] is None
        finally:
            disconnected.cancel()
            self.cancel()

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.queue.put_nowait(None)

    def cancel(self) -> None:
        for handle in self.handles:
            if not handle.future.done():
                handle.cancel()

    async def wait_for_images(self, receive: Receive) -> list[GeneratedImage]:
        """All images in the order of the handles; raises the first failure."""
        async with contextlib.aclosing(self.events(receive)) as events:
            async for handle, step in events:
                if handle and step is None and (error := get_failure(handle)):
                    raise error
        return [handle.future.result() for handle in self.handles]


def get_failure(handle: RequestHandle) -> BaseException | None:
    """The exception of a finished request, None if it succeeded."""
    if handle.future.cancelled():
        return RequestCancelled("the request was cancelled")
    return handle.future.exception()
