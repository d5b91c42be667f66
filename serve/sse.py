"""Server-sent events: their format, and the streaming response."""

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ClientDisconnected, api_error_from_exception

HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def format_event(event_type: str, fields: dict[str, Any]) -> bytes:
    """Serialize one event; its data repeats the type, as OpenAI's do."""
    data = json.dumps({"type": event_type, **fields}, separators=(",", ":"), allow_nan=False)
    return f"event: {event_type}\ndata: {data}\n\n".encode("ascii")


class EventStreamResponse(Response):
    """Sends events as they are produced. A failure is sent as the last event; a disconnect closes
    the generator.

    Does not read the connection's messages: the generator watches for the disconnect.
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
            except ClientDisconnected:
                return
            except Exception as error:
                last = format_event("error", api_error_from_exception(error).body(scope["path"]))
                await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
