"""Error responses: every exception as a status and a body in the format of the endpoint's API."""

import json
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from sdrt.errors import SdrtError, StorageError, UsageError
from sdrt.runtime.batching.request import RequestCancelled, RequestRejected

log = logging.getLogger("sdrt.serve")

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class ClientDisconnected(Exception):
    """The client closed the connection before the response."""


@dataclass(eq=False)
class ApiError(HTTPException):
    """An error response.

    Attributes:
        status_code: The HTTP status.
        message: For people.
        param: The field at fault.
        code: For programs.
        retry_after: Seconds until the request may succeed.
    """

    status_code: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None

    def __str__(self) -> str:
        return f"{self.status_code}: {self.message}"

    @property
    def error_type(self) -> str:
        default = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return ERROR_TYPES.get(self.status_code, default)

    def body(self, path: str) -> dict[str, Any]:
        """The body in OpenAI's format, or in A1111's under `/sdapi/`."""
        if path.startswith("/sdapi/"):
            return {
                "error": self.error_type,
                "detail": self.message,
                "body": "",
                "errors": self.message,
            }
        error = {
            "message": self.message,
            "type": self.error_type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self, path: str) -> Response:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status_code == 401:
            headers["www-authenticate"] = "Bearer"
        return json_response(self.body(path), self.status_code, headers)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response of ASCII JSON: echoed fields may contain lone surrogates."""
    body = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Response(body, status, headers, media_type="application/json")


def api_error_from_exception(error: BaseException) -> ApiError:
    """The response for an exception. Unexpected ones are logged, and not shown to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnected):
        return ApiError(499, "client disconnected")
    if isinstance(error, UsageError):
        return ApiError(400, _one_line(error), code="invalid_value")
    if isinstance(error, RequestRejected):
        return ApiError(503, _one_line(error), code=error.cause, retry_after=error.retry_after)
    if isinstance(error, RequestCancelled):
        return ApiError(503, str(error), code="cancelled", retry_after=1.0)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    log_failure(error)
    if isinstance(error, StorageError):
        return ApiError(500, _one_line(error), code="storage_error")
    if isinstance(error, SdrtError):
        return ApiError(500, _one_line(error), code="engine_error")
    return ApiError(500, "internal server error; see the server's log", code="internal_error")


def _one_line(error: SdrtError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def api_error_from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The response for pydantic's first finding. It never quotes the value of a field."""
    first = errors[0] if errors else {"loc": ("body",), "msg": "unreadable", "type": ""}
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {name!r}", name, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name or 'a JSON body'} is missing", name, "missing_parameter")
    if name is None and first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    return ApiError(400, f"{name or 'the body'}: {first['msg']}", name, "invalid_value")


def log_failure(error: BaseException) -> None:
    """Log the type and traceback of an exception, not its message, which may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s\n%s", type(error).__name__, frames)
