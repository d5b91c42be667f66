"""Server-sent events: how they are written, and the response that carries them."""

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import Gone, problem_from

HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def event_bytes(kind: str, fields: dict[str, Any]) -> bytes:
    """One event, its type in its data as well."""
    data = json.dumps({"type": kind, **fields}, separators=(",", ":"), allow_nan=False)
    return f"event: {kind}\ndata: {data}\n\n".encode("ascii")


class EventStream(Response):
    """Sends events as they come. A failure is the last event; a client that is gone ends it.

    It leaves the connection's messages to the source of its events, which hears the disconnect.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(None, headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self.events):
            try:
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Gone:
                return
            except Exception as error:
                last = event_bytes("error", problem_from(error).body(scope["path"]))
                await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
