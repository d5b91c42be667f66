"""JSON bodies as RFC 8259 has them. Knows requests; not what is in them."""

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from .errors import ApiError


class StrictRoute(APIRoute):
    """Reads JSON bodies as RFC 8259 has them: no NaN, no name twice, not endlessly deep."""

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
                await self.body(), object_pairs_hook=_object, parse_constant=_constant
            )
        except RecursionError:
            raise ApiError(400, "JSON that is nested too deeply", code="invalid_json") from None
        except ValueError as error:
            raise ApiError(400, f"no valid JSON: {error}", code="invalid_json") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ApiError(400, f"the field {name!r} comes twice", name, "invalid_json")
        made[name] = value
    return made


def _constant(name: str) -> None:
    raise ApiError(400, f"{name} is no JSON number", code="invalid_json")
