"""What clients of `/sdapi` read before they ask: lists, empty ones where there is nothing."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sdrt.runtime.batching.cost_model import memory_of_machine
from sdrt.runtime.lora.names import alias_of, list_loras
from sdrt.serve.dependencies import context_of
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.strict_json import StrictRoute

from .sampling import listed_samplers, listed_schedulers

router = APIRouter(route_class=StrictRoute)
API = "/sdapi/v1"

# By path: of what this server has none, in the original's shape.
EMPTY: dict[str, Any] = {
    "latent-upscale-modes": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "sd-vae": [],
    "sd-modules": [],
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "extensions": [],
}
# What is read anew each time, or at the server's start alone: there is nothing to be done.
REFRESHED = ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings")


def _answering(value: Any) -> Any:
    async def answer() -> Response:
        return json_response(value)

    return answer


for path, value in EMPTY.items():
    router.add_api_route(f"{API}/{path}", _answering(value), methods=["GET"], name=path)
for path in (*REFRESHED, "reload-checkpoint"):
    router.add_api_route(f"{API}/{path}", _answering(None), methods=["POST"], name=path)
router.add_api_route("/internal/ping", _answering({}), methods=["GET"], name="ping")


@router.get(f"{API}/samplers")
async def samplers() -> Response:
    """Every name that `sampler_name` takes."""
    return json_response(listed_samplers())


@router.get(f"{API}/schedulers")
async def schedulers() -> Response:
    """What `scheduler` takes beside a `sampler_name`."""
    return json_response(listed_schedulers())


@router.get(f"{API}/sd-models")
async def sd_models(request: Request) -> Response:
    """The models of this server."""
    none = {"hash": None, "sha256": None, "config": None}
    return json_response(
        [
            {"title": name, "model_name": name, "filename": name, **none}
            for name in context_of(request).models.sources
        ]
    )


@router.get(f"{API}/loras")
async def loras() -> Response:
    """The LoRA files in the folder `loras` of sdrt's home."""
    return json_response(
        [
            {"name": name, "alias": alias_of(path), "path": f"{name}{path.suffix}", "metadata": {}}
            for name, path in list_loras().items()
        ]
    )


@router.get(f"{API}/cmd-flags")
async def cmd_flags(request: Request) -> Response:
    """How the server was started, as far as the original has a flag for it."""
    settings = context_of(request).settings
    listens = settings.host not in ("127.0.0.1", "localhost")
    return json_response(
        {"api": True, "nowebui": False, "listen": listens, "port": settings.port, "api_log": True}
    )


@router.get(f"{API}/memory")
async def memory() -> Response:
    """Bytes of this machine; `used` is this process's."""
    found = memory_of_machine()
    ram = {name: found[name] for name in ("free", "used", "total")}
    gpu = found.get("gpu")
    return json_response(
        {"ram": ram, "cuda": {"system": {"total": gpu}} if gpu else {"error": "unavailable"}}
    )


@router.post(f"{API}/unload-checkpoint")
async def unload_checkpoint() -> Response:
    """Refused: other clients use the model too."""
    raise ApiError(400, "models stay loaded while the server runs; end it to free their memory")


@router.post(f"{API}/interrogate")
async def interrogate() -> Response:
    """Refused by name: no model here describes images."""
    raise ApiError(400, "interrogate is not supported: no model here describes images")
