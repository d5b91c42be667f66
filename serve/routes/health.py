"""Whether the server lives, whether it can be given work, and its figures."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from sdrt.serve.dependencies import context_of
from sdrt.serve.errors import json_response

router = APIRouter()


@router.get("/health/live")
async def live() -> Response:
    """The process answers."""
    return json_response({"status": "live"})


@router.get("/health/ready", responses={503: {"description": "loading, draining or broken"}})
async def ready(request: Request) -> Response:
    """Every model can be given work; 503 while one is loading, draining or broken."""
    states = context_of(request).models.states
    fit = all(state in ("ready", "unloaded") for state in states.values())
    body = {"status": "ready" if fit else "not ready", "models": states}
    return json_response(body, 200 if fit else 503, {} if fit else {"retry-after": "1"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    text, content_type = context_of(request).metrics.text(request.headers.get("accept", ""))
    return Response(text, headers={"content-type": content_type})
