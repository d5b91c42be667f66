"""Checks before every request: Host and Origin headers, API key, size and speed of the body.

ASGI middleware. It reads the full body within the limits, replays it to the application, then
passes on the connection's own messages, so that the application notices a disconnect.
"""

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_keys import ApiKey, hash_key
from .errors import ApiError, ClientDisconnected, api_error_from_exception
from .logs import set_request_id
from .metrics import Metrics
from .rate_limits import KeyUsage, RateLimiter
from .settings import Settings

log = logging.getLogger("sdrt.serve")

PUBLIC_PATHS = ("/", "/docs", "/openapi.json")  # served without an API key
PUBLIC_PREFIXES = ("/health/", "/page/")
# Requested every few seconds, by probes and while a prompt is typed on the page.
PROBE_PREFIXES = ("/health/", "/metrics", "/v1/tokens", "/v1/images/estimates")
# What counts as a request for images.
IMAGE_PATHS = (
    *("/v1/images/generations", "/v1/images/edits", "/v1/jobs"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img"),
    *("/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images"),
)
LINGER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class SecurityMiddleware:
    """Wraps the application in its checks, and logs and counts every response."""

    app: ASGIApp
    settings: Settings
    metrics: Metrics
    limiter: RateLimiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, headers = scope["method"], _headers(scope)
        identifier = set_request_id(headers.get("x-request-id"))
        scope = {**scope, "method": "GET" if method == "HEAD" else method}  # no body is sent
        scope["headers"] = _with_header(scope["headers"], b"x-request-id", identifier.encode())
        started, response = time.monotonic(), _ResponseRecorder(send, identifier)
        client = scope["client"][0] if scope.get("client") else None
        tracing = self.settings.tracing
        with tracing.start_request(method, scope["path"], client, headers) as span:
            try:
                await self._check_and_forward(scope, headers, receive, response)
            except Exception as error:
                if not response.status:  # else the response has begun
                    error_response = api_error_from_exception(error).response(scope["path"])
                    await error_response(scope, receive, response)
            span.set_response(_route_template(scope), response.status)
        self.metrics.record_response(_route_template(scope), response.status)
        _log_access(scope, method, response.status, time.monotonic() - started)

    async def _check_and_forward(
        self,
        scope: Scope,
        headers: dict[str, str],
        receive: Receive,
        response: "_ResponseRecorder",
    ) -> None:
        check_origin(headers, self.settings.hosts)
        owner = authenticate(headers, scope["path"], self.settings.keys)
        scope["state"]["owner"] = owner
        try:
            if owner is not None:
                response.usage = self.limiter.usages[owner]
                if scope["method"] == "POST" and scope["path"] in IMAGE_PATHS:
                    response.usage.count_request()
            body = await self._read_body(headers, receive)
        except ApiError as error:
            await _reject_body(error, scope, receive, response)
            return
        await self.app(scope, _replay_body(body, receive), response)

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The full body; raises ApiError 413 if it is, or is declared, too large, 408 if it takes
        too long.
        """
        limit, length = self.settings.max_body_bytes, headers.get("content-length", "0")
        too_large = ApiError(413, f"the body exceeds {limit} bytes", code="body_too_large")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            seconds = self.settings.body_seconds
            raise ApiError(
                408, f"the body took longer than {seconds:g} s", code="slow_body"
            ) from None
        return bytes(body)


class _ResponseRecorder:
    """Wraps `send`; records the status and adds headers."""

    def __init__(self, send: Send, identifier: str) -> None:
        self.send, self.identifier, self.status = send, identifier, 0
        self.usage: KeyUsage | None = None  # of the request's API key

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = _with_header(
                message.get("headers", ()), b"x-content-type-options", b"nosniff"
            )
            headers = _with_header(headers, b"x-request-id", self.identifier.encode())
            message["headers"] = [*headers, *(self.usage.headers() if self.usage else ())]
        await self.send(message)


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then the connection's own messages."""
    replayed = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_replayed() -> Message:
        return replayed.pop() if replayed else await receive()

    return receive_replayed


async def _reject_body(
    error: ApiError, scope: Scope, receive: Receive, send: _ResponseRecorder
) -> None:
    """Respond at once, then read on for a moment: closing a connection with unread bytes resets
    it, and the client would not see the response.
    """
    response = error.response(scope["path"])
    headers = [*response.raw_headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message.get("more_body", False)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _log_access(scope: Scope, method: str, status: int, seconds: float) -> None:
    """The access log: one line for each request; probes are logged at debug level."""
    path = scope["raw_path"].decode("ascii", "replace")  # percent-encoded: no line breaks
    client = scope["client"][0] if scope.get("client") else "-"
    fields = {"method": method, "path": path, "status": status, "client": client}
    level = logging.DEBUG if scope["path"].startswith(PROBE_PREFIXES) else logging.INFO
    message = f"{client} {method} {path} {status} {seconds:.3f} s"
    log.log(level, "%s", message, extra=fields | {"seconds": round(seconds, 4)})


def _with_header(
    headers: Iterable[tuple[bytes, bytes]], name: bytes, value: bytes
) -> list[tuple[bytes, bytes]]:
    return [*(header for header in headers if header[0].lower() != name), (name, value)]


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def check_origin(headers: dict[str, str], hosts: tuple[str, ...] | None) -> None:
    """Raise ApiError 403 for cross-origin requests, and for unknown Host headers, which protects
    against DNS rebinding.
    """
    host = headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if hosts is not None and name.lower() not in hosts:
        raise ApiError(
            403, f"unknown host {name!r}; allow it with `sdrt serve --allow-host NAME`", "host"
        )
    origin = headers.get("origin")
    same_origin = (f"http://{host}".lower(), f"https://{host}".lower())
    if origin is not None and origin.lower() not in same_origin:
        raise ApiError(403, "cross-origin request refused", code="foreign_origin")


def authenticate(headers: dict[str, str], path: str, keys: tuple[ApiKey, ...] | None) -> int | None:
    """The index of the request's API key, None if none is required; raises ApiError 401 for a
    missing or unknown key.
    """
    if keys is None or path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES):
        return None
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    digest = hash_key(key.encode("latin-1"))
    # Compare with every key, so that the time taken reveals nothing.
    matches = [i for i, known in enumerate(keys) if hmac.compare_digest(known.digest, digest)]
    if not matches or not key:
        raise ApiError(
            401,
            "missing or invalid API key; send Authorization: Bearer KEY or X-Api-Key: KEY",
            code="invalid_api_key",
        )
    return matches[0]


def _route_template(scope: Scope) -> str:
    """The declared path of the route, which keeps the number of metric labels small."""
    return getattr(scope.get("route"), "path", None) or "other"
