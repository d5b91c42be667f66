"""What a fleet's clients reach: it checks them as a single server does and hands each request to a
replica that has its model.

Knows Ray Serve and the paths of the API; not how they are answered. A request that is refused, or
whose replica is lost before its answer began, is given to a replica once more: no picture leaves a
trace that the next would find. What was begun ends with a typed error.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdrt.serve.errors import ApiError
from sdrt.serve.metrics import Metrics
from sdrt.serve.middleware import Guard
from sdrt.serve.routes.sdapi.options import known_name
from sdrt.serve.settings import Settings
from sdrt.serve.sse import event_bytes

from .aggregate import merge_for
from .replica import Answer

ATTEMPTS = 3
RETRY_SECONDS = 5.0
TOGETHER_SECONDS = 10.0
HANDED = (
    "type method path raw_path query_string headers scheme client server http_version root_path"
)


class Again(Exception):
    """Nothing was sent to the client, and another replica may do better."""


@serve.ingress()
class Ingress:
    """A Ray Serve deployment."""

    def __init__(self, replicas: DeploymentHandle, names: Sequence[str], settings: Settings):
        self.replicas, self.names, self.settings = replicas, tuple(names), settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Served(Guard(self._handed_on, self.settings, Metrics()))

    async def _handed_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        plain = {key: scope[key] for key in HANDED.split() if key in scope}
        if merge := merge_for(scope["path"]):
            await _send(merge(await self._together(plain, body)), send)
            return
        name = await self._model(scope, body)
        relay = asyncio.create_task(self._relayed(name, plain, body, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
            if relay.done():
                relay.result()
        finally:
            gone.cancel()
            relay.cancel()

    async def _model(self, scope: Scope, body: bytes) -> str:
        """Whose replica is to be asked; any one's for what makes no pictures."""
        if scope["method"] != "POST":
            return ""
        name = await model_named(scope, body)
        return known_name(name or "", self.names) or self.names[0]

    async def _together(self, scope: Scope, body: bytes) -> dict[str, Answer]:
        """The answers of all replicas by name; raises ApiError 503 if there are none."""
        try:
            asked = self.replicas.broadcast("answer", scope, body)
            found = await asked.results_async(timeout_s=TOGETHER_SECONDS, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            found = []
        answers = dict(one for one in found if not isinstance(one, BaseException))
        if not answers:
            raise _unavailable("no replica is up")
        return answers

    async def _relayed(self, name: str, scope: Scope, body: bytes, send: Send) -> None:
        """A replica's answer, or that of the next one."""
        for left in reversed(range(ATTEMPTS)):
            try:
                await self._once(name, scope, body, send, last=not left)
                return
            except Again:
                continue
        raise _unavailable(f"the request's replica was lost {ATTEMPTS} times")

    async def _once(self, name: str, scope: Scope, body: bytes, send: Send, *, last: bool) -> None:
        """One replica's answer. Raises Again where it was lost or, but the last time, refuses."""
        call = self.replicas.options(stream=True, multiplexed_model_id=name)
        heard = call.forward.remote(scope, body)
        head: Message = {"status": 0, "headers": []}  # held back until there is more
        begun = False
        try:
            async for message in heard:
                if message["type"] == "http.response.start":
                    head = message
                    continue
                if head["status"] == 503 and not last:
                    raise Again
                if not begun:
                    await send(head)
                    begun = True
                await send(message)
        except BackPressureError as error:
            raise ApiError(503, "all replicas are busy", None, "queue", RETRY_SECONDS) from error
        except (RayError, RayServeException) as error:
            if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
                raise
            if not begun:
                raise Again from error
            problem = _unavailable("the replica that made the picture was lost")
            end = event_bytes("error", problem.body(scope["path"])) if _is_stream(head) else b""
            await send({"type": "http.response.body", "body": end, "more_body": False})
        finally:
            heard.cancel()


class Served:
    """An application behind what Ray Serve asks of one: it begins and ends, and has a state."""

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


async def model_named(scope: Scope, body: bytes) -> str | None:
    """The model that a request names, None where it names none or cannot be read."""
    kind = dict(scope["headers"]).get(b"content-type", b"")
    try:
        if kind.startswith(b"multipart/"):
            async with Request(scope, _body(body)).form() as form:
                return str(form.get("model"))
        asked = json.loads(body)
        if scope["path"].startswith("/sdapi/"):
            return str(asked["override_settings"]["sd_model_checkpoint"])
        return str(asked["model"])
    except Exception:  # the replica says what is wrong with it
        return None


def _body(body: bytes) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(answer: Answer, send: Send) -> None:
    status, headers, body = answer
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_stream(head: Message) -> bool:
    headers: Any = dict(head["headers"])
    return bool(headers.get(b"content-type", b"").startswith(b"text/event-stream"))


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, None, "unavailable", RETRY_SECONDS)
