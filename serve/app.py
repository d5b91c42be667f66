"""The ASGI application: routes, exception handlers, the OpenAPI schema and the page, behind the
security middleware.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from sdrt.errors import SdrtError
from sdrt.version import __version__

from .dependencies import ServerContext
from .errors import (
    ApiError,
    ClientDisconnected,
    api_error_from_exception,
    api_error_from_validation,
)
from .gallery import Gallery
from .metrics import Metrics
from .middleware import SecurityMiddleware
from .model_manager import ModelManager, ModelSource
from .rate_limits import RateLimiter
from .routes import estimates, extra_networks, gallery, health, jobs, openai
from .routes.sdapi import control as sdapi_control
from .routes.sdapi import extras as sdapi_extras
from .routes.sdapi import lists as sdapi_lists
from .routes.sdapi import options as sdapi_options
from .routes.sdapi import routes as sdapi_routes
from .schemas import EditRequest
from .settings import Settings

JSON_TYPE = re.compile(r"application/(\w[\w.+-]*\+)?json")
PAGE_FOLDER = Path(__file__).parent / "page"
CONTENT_SECURITY_POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"


def create_app(
    sources: Mapping[str, ModelSource],
    settings: Settings,
    running_jobs: jobs.RunningJobs | None = None,
    stored_images: Gallery | None = None,
) -> tuple[SecurityMiddleware, ModelManager]:
    """Build the application and its model manager, whose models are not loaded yet.

    Args:
        sources: The models by name; the first is the default.
        settings: The configuration.
        running_jobs: Those of a server that stores jobs.
        stored_images: The gallery of a server that stores images.
    """
    metrics, limiter = Metrics(), RateLimiter(settings.keys)
    metrics.track_keys(limiter.usages)
    models = ModelManager(sources, settings, metrics)
    app = FastAPI(title="sdrt", version=__version__, docs_url=None, redoc_url=None)
    app.state.context = ServerContext(settings, models, metrics, limiter, stored_images)
    app.state.running_jobs = running_jobs or jobs.RunningJobs()
    app.state.jobs = sdapi_routes.JobRegistry()
    app.state.sd_options = sdapi_options.ServerOptions()
    sdapi = sdapi_routes, sdapi_options, sdapi_extras, sdapi_lists, sdapi_control
    for module in (openai, estimates, extra_networks, gallery, jobs, *sdapi, health):
        app.include_router(module.router)
    for kind in (HTTPException, SdrtError, RequestValidationError, ClientDisconnected, Exception):
        app.add_exception_handler(kind, _handle_exception)
    _extend_schema(app)
    if PAGE_FOLDER.is_dir():
        _mount_page(app)
    return SecurityMiddleware(app, settings, metrics, limiter), models


async def _handle_exception(request: Request, error: Exception) -> Response:
    """Turn an exception into an error response in the format of the endpoint's API."""
    path = request.url.path
    if not isinstance(error, RequestValidationError):
        return api_error_from_exception(error).response(path)
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    not_an_object = any(tuple(item["loc"]) == ("body",) for item in error.errors())
    if not_an_object and not JSON_TYPE.fullmatch(content_type):
        received = content_type or "none"
        message = f"expected Content-Type application/json, received {received}"
        return ApiError(415, message, code="invalid_type").response(path)
    api_error = api_error_from_validation(error.errors())
    if path.startswith("/sdapi/"):
        api_error.status_code = 422  # as A1111 answers
    return api_error.response(path)


class RevalidatedFiles(StaticFiles):
    """Static files that browsers revalidate on every visit, so that modules of two versions of the
    page are never mixed.
    """

    def file_response(self, *args: Any, **named: Any) -> Response:
        response = super().file_response(*args, **named)
        response.headers["cache-control"] = "no-cache"
        return response


def _mount_page(app: FastAPI) -> None:
    app.mount("/page", RevalidatedFiles(directory=PAGE_FOLDER))
    headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "cache-control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE_FOLDER / "index.html", headers=headers)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(PAGE_FOLDER / "docs.html", headers=headers)


def _extend_schema(app: FastAPI) -> None:
    """Add the multipart form of `/v1/images/edits`, which is parsed by hand, to the schema."""
    build: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = build()
        form = EditRequest.model_json_schema()
        file = {"type": "string", "format": "binary"}
        form["properties"] |= {"image": file, "mask": file}
        form["required"] = [*form.get("required", ()), "image"]
        schema["components"]["schemas"]["EditForm"] = form
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
