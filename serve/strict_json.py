"""Strict parsing of JSON bodies (RFC 8259). Knows requests; not their fields."""

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from .errors import ApiError


class StrictRoute(APIRoute):
    """A route whose JSON bodies are strict: no NaN, no duplicate names, bounded nesting."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            response: Response = await handler(_StrictRequest(request.scope, request.receive))
            return response

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return json.loads(
                await self.body(),
                object_pairs_hook=_reject_duplicates,
                parse_constant=_reject_constant,
            )
        except RecursionError:
            raise ApiError(400, "the JSON body is nested too deeply", code="invalid_json") from None
        except ValueError as error:
            raise ApiError(400, f"invalid JSON: {error}", code="invalid_json") from None


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ApiError(400, f"duplicate field {name!r}", name, "invalid_json")
        result[name] = value
    return result


def _reject_constant(name: str) -> None:
    raise ApiError(400, f"{name} is not a JSON number", code="invalid_json")
