"""The ingress deployment: checks requests as a single server does and routes each to a replica that
has its model, and its LoRA files if possible.

Knows Ray Serve and the paths of the API; not how requests are handled. A request that is rejected,
or whose replica is lost before its response began, is retried: requests have no side effects. A
response that has begun ends with an error.
"""

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdrt.serve.errors import ApiError
from sdrt.serve.metrics import Metrics
from sdrt.serve.middleware import SecurityMiddleware
from sdrt.serve.rate_limits import RateLimiter
from sdrt.serve.routes.sdapi.options import match_model_name
from sdrt.serve.settings import Settings
from sdrt.serve.sse import format_event

from .aggregate import get_merger
from .lora_affinity import read_lora_tags
from .replica import ReplicaResponse

ATTEMPTS = 3
RETRY_SECONDS = 5.0
UNREADABLE = (HTTPException, MultiPartException, LookupError, TypeError, ValueError, RecursionError)
BROADCAST_SECONDS = 10.0
FORWARDED_SCOPE_KEYS = (
    "type method path raw_path query_string headers scheme client server http_version root_path"
)


class RetryRequest(Exception):
    """Nothing has been sent to the client, and another replica may accept the request."""


@serve.ingress()
class Ingress:
    """The Ray Serve deployment that receives HTTP requests."""

    def __init__(
        self,
        replicas: DeploymentHandle,
        names: Sequence[str],
        settings: Settings,
        switching: Collection[str],
    ) -> None:
        """switching: names of models whose weights are changed for other LoRA files"""
        self.replicas, self.names, self.settings = replicas, tuple(names), settings
        self.switching = frozenset(switching)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return LifespanApp(
            SecurityMiddleware(
                self._handle, self.settings, Metrics(), RateLimiter(self.settings.keys)
            )
        )

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        plain = {key: scope[key] for key in FORWARDED_SCOPE_KEYS.split() if key in scope}
        if merge := get_merger(scope["path"]):
            await _send(merge(await self._broadcast(plain, body)), send)
            return
        name, lora_tags = await self._read_target(scope, body)
        relay = asyncio.create_task(self._forward(name, lora_tags, plain, body, send))
        disconnected = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({relay, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if relay.done():
                relay.result()
        finally:
            disconnected.cancel()
            relay.cancel()

    async def _read_target(self, scope: Scope, body: bytes) -> tuple[str, str | None]:
        """The model whose replica handles the request, "" for any replica, and the LoRA files that
        the replica should carry, None for any.
        """
        if scope["method"] != "POST":
            return "", None
        fields = await read_fields(scope, body)
        requested = read_model_name(scope["path"], fields)
        name = match_model_name(requested or "", self.names) or self.names[0]
        return name, read_lora_tags(scope["path"], fields) if name in self.switching else None

    async def _broadcast(self, scope: Scope, body: bytes) -> dict[str, ReplicaResponse]:
        """The responses of all replicas by name; raises ApiError 503 if there are none."""
        try:
            calls = self.replicas.broadcast("respond", scope, body)
            results = await calls.results_async(timeout_s=BROADCAST_SECONDS, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            results = []
        responses = dict(item for item in results if not isinstance(item, BaseException))
        if not responses:
            raise _unavailable("no replica is available")
        return responses

    async def _forward(
        self, name: str, lora_tags: str | None, scope: Scope, body: bytes, send: Send
    ) -> None:
        """Forward a request to a replica, and to another one if that fails."""
        for remaining in reversed(range(ATTEMPTS)):
            try:
                await self._forward_once(name, lora_tags, scope, body, send, last=not remaining)
                return
            except RetryRequest:
                lora_tags = None  # the replica that has the files has failed
        raise _unavailable(f"the request's replica was lost {ATTEMPTS} times")

    async def _forward_once(
        self,
        name: str,
        lora_tags: str | None,
        scope: Scope,
        body: bytes,
        send: Send,
        *,
        last: bool,
    ) -> None:
        """Forward to one replica. Raises RetryRequest if it was lost or, unless `last`, if it
        rejects the request.
        """
        replica = self.replicas.options(stream=True, multiplexed_model_id=name)
        messages = replica.forward.remote(scope, body, lora_tags=lora_tags)
        head: Message = {"status": 0, "headers": []}  # sent with the first part of the body
        started = False
        try:
            async for message in messages:
                if message["type"] == "http.response.start":
                    head = message
                    continue
                if head["status"] == 503 and not last:
                    raise RetryRequest
                if not started:
                    await send(head)
                    started = True
                await send(message)
        except BackPressureError as error:
            raise ApiError(503, "all replicas are busy", None, "queue", RETRY_SECONDS) from error
        except (RayError, RayServeException) as error:
            if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
                raise
            if not started:
                raise RetryRequest from error
            lost = _unavailable("the replica that generated the image was lost").body(scope["path"])
            event = format_event("error", lost) if _is_event_stream(head) else b""
            await send({"type": "http.response.body", "body": event, "more_body": False})
        finally:
            messages.cancel()


class LifespanApp:
    """Adds what Ray Serve expects of an ASGI application: lifespan events and a state."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            scope.setdefault("state", {})
            await self.app(scope, receive, send)
            return
        for step in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{step}.complete"})


async def read_fields(scope: Scope, body: bytes) -> Mapping[str, Any]:
    """The fields of a request's body; none if it is invalid."""
    content_type = dict(scope["headers"]).get(b"content-type", b"")
    try:
        if content_type.startswith(b"multipart/"):
            async with Request(scope, _receive_body(body)).form() as form:
                return {name: value for name, value in form.items() if isinstance(value, str)}
        fields = json.loads(body)
        return fields if isinstance(fields, dict) else {}
    except UNREADABLE:  # the replica responds with the error
        return {}


def read_model_name(path: str, fields: Mapping[str, Any]) -> str | None:
    """The model that a request names; None if it names none or is invalid."""
    try:
        if path.startswith("/sdapi/"):
            return str(fields["override_settings"]["sd_model_checkpoint"])
        return str(fields["model"])
    except (LookupError, TypeError):  # the replica responds with the error
        return None


def _receive_body(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(response: ReplicaResponse, send: Send) -> None:
    status, headers, body = response
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_event_stream(head: Message) -> bool:
    headers: Any = dict(head["headers"])
    return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, None, "unavailable", RETRY_SECONDS)
