"""Liveness, readiness and metrics."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from sdrt.serve.dependencies import get_context
from sdrt.serve.errors import json_response

router = APIRouter()


@router.get("/health/live", responses={503: {"description": "a GPU is lost; restart"}})
async def live(request: Request) -> Response:
    """Liveness: the process responds; 503 once only a new process can use the GPU."""
    if get_context(request).models.device_error:
        return json_response({"status": "lost"}, 503)
    return json_response({"status": "live"})


@router.get("/health/ready", responses={503: {"description": "loading, draining or broken"}})
async def ready(request: Request) -> Response:
    """Readiness: every model accepts requests; 503 while one is loading, draining or broken. Under
    a memory budget only pinned models need to be loaded.
    """
    models = get_context(request).models
    is_ready = models.is_ready
    body = {"status": "ready" if is_ready else "not ready", "models": models.states}
    return json_response(body, 200 if is_ready else 503, {} if is_ready else {"retry-after": "1"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    text, content_type = get_context(request).metrics.render(request.headers.get("accept", ""))
    return Response(text, headers={"content-type": content_type})
