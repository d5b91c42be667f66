"""The lists that clients of `/sdapi` read at startup; empty where this server has nothing."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from sdrt.runtime.batching.cost_model import get_memory_info
from sdrt.runtime.lora.names import list_loras, read_alias
from sdrt.runtime.textual_inversion.words import Embedding
from sdrt.runtime.upscaling import LATENT_UPSCALERS
from sdrt.serve.dependencies import get_context
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.strict_json import StrictRoute

from .control import SCRIPT
from .options import request_options
from .sampling import list_samplers, list_schedulers

router = APIRouter(route_class=StrictRoute)
API = "/sdapi/v1"

# By path: lists in A1111's format that never change.
CONSTANT_LISTS: dict[str, Any] = {
    "latent-upscale-modes": [{"name": upscaler.title} for upscaler in LATENT_UPSCALERS],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "sd-vae": [],
    "sd-modules": [],
    "script-info": [],
    "extensions": [],
}
# Nothing to refresh: read on every request, or only when the server starts.
REFRESH_PATHS = ("refresh-checkpoints", "refresh-vae", "refresh-loras")


def _constant_handler(value: Any) -> Any:
    async def answer() -> Response:
        return json_response(value)

    return answer


for path, value in CONSTANT_LISTS.items():
    router.add_api_route(f"{API}/{path}", _constant_handler(value), methods=["GET"], name=path)
for path in REFRESH_PATHS:
    router.add_api_route(f"{API}/{path}", _constant_handler(None), methods=["POST"], name=path)
router.add_api_route("/internal/ping", _constant_handler({}), methods=["GET"], name="ping")


@router.get(f"{API}/samplers")
async def samplers() -> Response:
    """Every name that `sampler_name` accepts."""
    return json_response(list_samplers())


@router.get(f"{API}/schedulers")
async def schedulers() -> Response:
    """The schedules that `scheduler` accepts in addition to `sampler_name`."""
    return json_response(list_schedulers())


@router.get(f"{API}/sd-models")
async def sd_models(request: Request) -> Response:
    """The models of this server."""
    none = {"hash": None, "sha256": None, "config": None}
    return json_response(
        [
            {"title": name, "model_name": name, "filename": name, **none}
            for name in get_context(request).models.sources
        ]
    )


@router.get(f"{API}/loras")
async def loras() -> Response:
    """The LoRA files in `$SDRT_HOME/loras`."""
    return json_response(
        [
            {
                "name": name,
                "alias": read_alias(path),
                "path": f"{name}{path.suffix}",
                "metadata": {},
            }
            for name, path in list_loras().items()
        ]
    )


@router.get(f"{API}/scripts")
async def scripts(request: Request) -> Response:
    """ControlNet where the default model has a net or an IP-Adapter: clients look for it here."""
    async with get_context(request).models.use(None) as model:
        names = [SCRIPT] if model.pipe.control_nets or model.pipe.ip_adapter else []
        return json_response({"txt2img": names, "img2img": names})


@router.get(f"{API}/embeddings")
async def embeddings(request: Request) -> Response:
    """The default model's words, and the files of `$SDRT_HOME/embeddings` that it cannot use."""
    async with get_context(request).models.use(None) as model:
        store = model.engine.pipe.embeddings
        return json_response(
            {
                "loaded": {e.word: _describe_embedding(e) for e in store.current.embeddings},
                "skipped": {file.name: {"reason": file.reason} for file in store.skipped},
            }
        )


@router.post(f"{API}/refresh-embeddings")
async def refresh_embeddings(request: Request) -> Response:
    """Read `$SDRT_HOME/embeddings` again; requests that have begun keep the words they had."""
    models = get_context(request).models
    for model in filter(None, map(models.find, models.sources)):
        await run_in_threadpool(model.engine.pipe.embeddings.read_folder)
    return json_response(None)


def _describe_embedding(embedding: Embedding) -> dict[str, Any]:
    widths = [vectors.shape[1] for vectors in embedding.by_encoder.values()]
    unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name"))
    return {**unknown, "shape": sum(widths), "vectors": embedding.num_vectors}


@router.get(f"{API}/cmd-flags")
async def cmd_flags(request: Request) -> Response:
    """The command line flags that A1111 has too."""
    settings = get_context(request).settings
    listens = settings.host not in ("127.0.0.1", "localhost")
    return json_response(
        {"api": True, "nowebui": False, "listen": listens, "port": settings.port, "api_log": True}
    )


@router.get(f"{API}/memory")
async def memory() -> Response:
    """Memory of this machine in bytes; `used` is that of this process."""
    available = get_memory_info()
    ram = {name: available[name] for name in ("free", "used", "total")}
    gpu = available.get("gpu")
    return json_response(
        {"ram": ram, "cuda": {"system": {"total": gpu}} if gpu else {"error": "unavailable"}}
    )


@router.post(f"{API}/unload-checkpoint")
async def unload_checkpoint(request: Request) -> Response:
    """Free the memory of the model in the options until it is used again; rejected without a memory
    budget, for pinned models, and while it is in use.
    """
    name = request_options(request, None)["sd_model_checkpoint"]
    await run_in_threadpool(get_context(request).models.unload_idle, name)
    return json_response(None)


@router.post(f"{API}/reload-checkpoint")
async def reload_checkpoint(request: Request) -> Response:
    """Load the model in the options if it is not loaded; without a memory budget it is."""
    models = get_context(request).models
    if models.cache:
        async with models.use(request_options(request, None)["sd_model_checkpoint"]):
            pass
    return json_response(None)


@router.post(f"{API}/interrogate")
async def interrogate() -> Response:
    """Rejected: there is no captioning model."""
    raise ApiError(400, "interrogate is not supported: there is no captioning model")
