"""The application: routes, the shape of errors, the schema, the page, all behind the guard."""

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

from .dependencies import Context
from .errors import ApiError, Gone, problem_from, problem_from_invalid
from .metrics import Metrics
from .middleware import Guard
from .model_manager import Models, Source
from .routes import health, openai
from .routes.sdapi import extras as sdapi_extras
from .routes.sdapi import lists as sdapi_lists
from .routes.sdapi import options as sdapi_options
from .routes.sdapi import routes as sdapi_routes
from .schemas import Edit
from .settings import Settings

JSON = re.compile(r"application/(\w[\w.+-]*\+)?json")
PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"


def application(sources: Mapping[str, Source], settings: Settings) -> tuple[Guard, Models]:
    """The application and its models, which are not loaded yet: call `load`."""
    metrics = Metrics()
    models = Models(sources, settings, metrics)
    app = FastAPI(title="sdrt", version=__version__, docs_url=None, redoc_url=None)
    app.state.context = Context(settings, models, metrics)
    app.state.jobs = sdapi_routes.Jobs()
    app.state.sd_options = sdapi_options.ServerOptions()
    for module in (openai, sdapi_routes, sdapi_options, sdapi_extras, sdapi_lists, health):
        app.include_router(module.router)
    for kind in (HTTPException, SdrtError, RequestValidationError, Gone, Exception):
        app.add_exception_handler(kind, _told)
    _schema(app)
    if PAGE.is_dir():
        _page(app)
    return Guard(app, settings, metrics), models


async def _told(request: Request, error: Exception) -> Response:
    """Every failure in the shape that the endpoint's clients read."""
    path = request.url.path
    if not isinstance(error, RequestValidationError):
        return problem_from(error).response(path)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    whole = any(tuple(each["loc"]) == ("body",) for each in error.errors())
    if whole and not JSON.fullmatch(kind):
        wanted = "Send Content-Type: application/json"
        return ApiError(415, wanted, code="invalid_type").response(path)
    problem = problem_from_invalid(error.errors())
    if path.startswith("/sdapi/"):
        problem.status_code = 422  # what these clients know
    return problem.response(path)


class PageFiles(StaticFiles):
    """Asked for anew on every visit: an old module beside a new one would break the page."""

    def file_response(self, *args: Any, **named: Any) -> Response:
        response = super().file_response(*args, **named)
        response.headers["cache-control"] = "no-cache"
        return response


def _page(app: FastAPI) -> None:
    app.mount("/page", PageFiles(directory=PAGE))
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=headers)


def _schema(app: FastAPI) -> None:
    """The form of edits in the schema: its fields are checked by hand, its files are files."""
    made: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        form = Edit.model_json_schema()
        file = {"type": "string", "format": "binary"}
        form["properties"] |= {"image": file, "mask": file}
        form["required"] = [*form.get("required", ()), "image"]
        schema["components"]["schemas"]["EditForm"] = form
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
