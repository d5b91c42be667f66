"""What prompts can name: LoRA files and embeddings, with their thumbnails."""

from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from sdrt.runtime.lora.names import list_loras, loras_folder, read_alias
from sdrt.runtime.textual_inversion.files import embeddings_folder, list_embedding_files
from sdrt.serve.dependencies import get_context
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.strict_json import StrictRoute
from sdrt.serve.thumbnails import find_thumbnail, read_thumbnail

router = APIRouter(prefix="/v1/extra-networks", route_class=StrictRoute)

Kind = Literal["loras", "embeddings"]


@router.get("")
async def list_extra_networks(request: Request, model: str | None = None) -> Response:
    """The LoRA files, and the embeddings that a model has loaded; none where it is not loaded under
    a memory budget.
    """
    context = get_context(request)
    models = context.models
    loaded = models.find(models.resolve_name(model)) if models.cache else models.get(model)
    embeddings = loaded.engine.pipe.embeddings.current.embeddings if loaded else ()
    words = [embedding.word for embedding in embeddings]
    return json_response(await context.run_in_thread(_describe, words))


def _describe(words: list[str]) -> dict[str, Any]:
    loras = [
        {
            "name": name,
            "alias": read_alias(path),
            "has_thumbnail": find_thumbnail(path, loras_folder()) is not None,
        }
        for name, path in list_loras().items()
    ]
    files = list_embedding_files()
    embeddings = [
        {
            "name": word,
            "has_thumbnail": word in files
            and find_thumbnail(files[word], embeddings_folder()) is not None,
        }
        for word in words
    ]
    return {"object": "list", "loras": loras, "embeddings": embeddings}


@router.get("/{kind}/{name:path}/thumbnail")
async def get_thumbnail(request: Request, kind: Kind, name: str) -> Response:
    """The image that lies next to a file as `NAME.png` or `NAME.preview.png`, made small."""
    content = await get_context(request).run_in_thread(_read_thumbnail, kind, name)
    return Response(content, media_type="image/jpeg")


def _read_thumbnail(kind: Kind, name: str) -> bytes:
    """The name is looked up among those of the folder; it never becomes part of a path."""
    files: dict[str, Path] = list_loras() if kind == "loras" else list_embedding_files()
    folder = loras_folder() if kind == "loras" else embeddings_folder()
    image = find_thumbnail(files[name], folder) if name in files else None
    if image is None:
        raise ApiError(404, f"{name!r} has no thumbnail", code="thumbnail_not_found")
    return read_thumbnail(image)
