"""What every request passes before the application: hosts, keys, the size and speed of its body.

Pure ASGI: it hands on a body that has arrived whole and within bounds, then the connection's own
messages, so that the application hears when a client is gone.
"""

import asyncio
import contextlib
import hmac
import logging
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, Gone, problem_from
from .metrics import Metrics
from .settings import Settings, digest_from_key

log = logging.getLogger("sdrt.serve")

OPEN = ("/", "/openapi.json")  # these, and what is in these folders, ask for no key
OPEN_FOLDERS = ("/health/", "/page/")
PROBED = ("/health/", "/metrics")  # by machines, every few seconds
LINGER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Guard:
    """The application behind its checks."""

    app: ASGIApp
    settings: Settings
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, answer = time.monotonic(), _Answer(send)
        try:
            await self._guarded(scope, receive, answer)
        except Exception as error:
            if not answer.status:  # else it was told already
                await problem_from(error).response(scope["path"])(scope, receive, answer)
        self.metrics.answered(_template(scope), answer.status)
        seconds = time.monotonic() - began
        level = logging.DEBUG if scope["path"].startswith(PROBED) else logging.INFO
        path = scope["raw_path"].decode("ascii", "replace")  # as sent: no line breaks
        log.log(level, "%s %s %d %.3f s", scope["method"], path, answer.status, seconds)

    async def _guarded(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        headers = _headers(scope)
        check_origin(headers, self.settings.hosts)
        scope["state"]["owner"] = owner_of(headers, scope["path"], self.settings.keys)
        try:
            body = await self._body(headers, receive)
        except ApiError as problem:
            await _refuse_body(problem, scope, receive, answer)
            return
        await self.app(scope, _replay(body, receive), answer)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body; raises ApiError 413 where it is, or says it is, too large, 408 where it
        takes too long.
        """
        most, length = self.settings.most_body, headers.get("content-length", "0")
        large = ApiError(413, f"a body of more than {most} bytes", code="body_too_large")
        if length.isascii() and length.isdigit() and int(length[:20]) > most:
            raise large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise large
        except TimeoutError:
            seconds = self.settings.body_seconds
            raise ApiError(
                408, f"the body took more than {seconds:g} s", code="slow_body"
            ) from None
        return bytes(body)


class _Answer:
    """`send`, remembering the status."""

    def __init__(self, send: Send) -> None:
        self.send, self.status = send, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-content-type-options", b"nosniff"),
            ]
        await self.send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what the connection itself says."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


async def _refuse_body(problem: ApiError, scope: Scope, receive: Receive, answer: _Answer) -> None:
    """Answer at once, then read on for a moment: a connection closed over unread bytes is reset,
    and the client would not see the answer.
    """
    response = problem.response(scope["path"])
    head = [*response.raw_headers, (b"connection", b"close")]
    await answer({"type": "http.response.start", "status": response.status_code, "headers": head})
    await answer({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
    await answer({"type": "http.response.body", "body": b"", "more_body": False})


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def check_origin(headers: dict[str, str], hosts: tuple[str, ...] | None) -> None:
    """Raise ApiError 403 for a web page from elsewhere, be it by its Origin or by a name of its own
    that was made to lead here.
    """
    host = headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if hosts is not None and name.lower() not in hosts:
        raise ApiError(
            403, f"host {name!r} is not served here; type: sdrt serve --allow-host NAME", "host"
        )
    origin = headers.get("origin")
    own = (f"http://{host}".lower(), f"https://{host}".lower())
    if origin is not None and origin.lower() not in own:
        raise ApiError(403, "a page from elsewhere may not call this server", code="foreign_origin")


def owner_of(headers: dict[str, str], path: str, keys: tuple[bytes, ...] | None) -> int | None:
    """Which key a request carries; raises ApiError 401 where it needs one and has none."""
    if keys is None or path in OPEN or path.startswith(OPEN_FOLDERS):
        return None
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    digest = digest_from_key(given.encode("latin-1"))
    # All are compared, so that the time tells nothing.
    matches = [i for i, key in enumerate(keys) if hmac.compare_digest(key, digest)]
    if not matches or not given:
        raise ApiError(
            401,
            "no valid API key; send Authorization: Bearer KEY or X-Api-Key: KEY",
            code="invalid_api_key",
        )
    return matches[0]


def _template(scope: Scope) -> str:
    """The route's path as it was declared, so that labels are few."""
    return getattr(scope.get("route"), "path", None) or "other"
