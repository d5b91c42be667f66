"""One request's tickets, followed from the event loop until they end or the client is gone."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial

from starlette.types import Receive

from sdrt.runtime import Step
from sdrt.runtime.batching.request import GeneratedImage, RequestCancelled, RequestHandle

from .errors import Gone

# A ticket's step, None with the ticket when it has ended, and neither when nothing was heard.
Event = tuple[RequestHandle | None, Step | None]


@dataclass(slots=True)
class ImageJob:
    """What the engine's threads tell, brought into the event loop. Made in that loop."""

    tickets: Sequence[RequestHandle] = ()
    queue: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def on_step(self, ticket: RequestHandle, step: Step) -> None:
        """Called in the engine's thread."""
        self._put((ticket, step))

    def follow(self, tickets: Sequence[RequestHandle]) -> None:
        self.tickets = tickets
        for ticket in tickets:
            ticket.future.add_done_callback(partial(self._ended, ticket))

    def _ended(self, ticket: RequestHandle, _: object) -> None:
        self._put((ticket, None))

    def _put(self, event: Event | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def events(
        self, receive: Receive, pulse: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Steps and ends until every ticket has ended; (None, None) after `pulse` seconds of
        silence. Tickets that have not ended when this does are cancelled. Raises Gone when the
        client is.
        """
        gone = asyncio.create_task(self._until_gone(receive))
        left = len(self.tickets)
        try:
            while left:
                try:
                    async with asyncio.timeout(pulse):
                        event = await self.queue.get()
                except TimeoutError:
                    event = None, None
                if event is None:
                    raise Gone
                yield event
                left -= event[0] is not None and event[1] is None
        finally:
            gone.cancel()
            self.cancel()

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.queue.put_nowait(None)

    def cancel(self) -> None:
        for ticket in self.tickets:
            if not ticket.future.done():
                ticket.cancel()

    async def pictures(self, receive: Receive) -> list[GeneratedImage]:
        """All pictures, in the tickets' order; raises what the first failure raised."""
        async with contextlib.aclosing(self.events(receive)) as events:
            async for ticket, step in events:
                if ticket and step is None and (error := failure_of(ticket)):
                    raise error
        return [ticket.future.result() for ticket in self.tickets]


def failure_of(ticket: RequestHandle) -> BaseException | None:
    """What an ended ticket failed with."""
    if ticket.future.cancelled():
        return RequestCancelled("the request was cancelled")
    return ticket.future.exception()
