"""Every refusal and failure as a status and a body, in the shape an endpoint's clients read."""

import json
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from sdrt.errors import SdrtError, UsageError
from sdrt.runtime.batching.request import RequestCancelled, RequestRejected

log = logging.getLogger("sdrt.serve")

KINDS = {401: "authentication_error", 403: "permission_error"}


class Gone(Exception):
    """The client closed the connection; there is nobody to answer."""


@dataclass(eq=False)
class ApiError(HTTPException):
    """What a client is told instead of what it asked for.

    param: the field at fault; code: for programs; retry_after: seconds
    """

    status_code: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None

    def __str__(self) -> str:
        return f"{self.status_code}: {self.message}"

    @property
    def kind(self) -> str:
        usual = "server_error" if self.status_code >= 500 else "invalid_request_error"
        return KINDS.get(self.status_code, usual)

    def body(self, path: str) -> dict[str, Any]:
        """OpenAI's shape, or that of the `/sdapi` endpoints."""
        if path.startswith("/sdapi/"):
            return {"error": self.kind, "detail": self.message, "body": "", "errors": self.message}
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
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
    """JSON in ASCII: what clients send back to themselves may be no valid Unicode."""
    body = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Response(body, status, headers, media_type="application/json")


def problem_from(error: BaseException) -> ApiError:
    """A problem for whatever was raised; what is no SdrtError is logged and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Gone):
        return ApiError(499, "the client is gone")
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, RequestRejected):
        return ApiError(503, str(error), code=error.cause, retry_after=error.retry_after)
    if isinstance(error, RequestCancelled):
        return ApiError(503, str(error), code="cancelled", retry_after=1.0)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    log_failure(error)
    if isinstance(error, SdrtError):
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "the server failed; its log says where", code="internal_error")


def problem_from_invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's findings, which never quotes more than the field's name."""
    first = errors[0] if errors else {"loc": ("body",), "msg": "cannot be read", "type": ""}
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {name!r}", name, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{name or 'a JSON body'} is missing", name, "missing_parameter")
    if name is None and first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    return ApiError(400, f"{name or 'the body'}: {first['msg']}", name, "invalid_value")


def log_failure(error: BaseException) -> None:
    """Where something failed, not with what words: messages may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s\n%s", type(error).__name__, frames)
