"""The gallery of a server that stores what it generates: list, search, fetch, delete."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from sdrt.runtime.images import convert_to_rgb, image_from_bytes
from sdrt.serve.dependencies import get_context, get_owner
from sdrt.serve.errors import ApiError, json_response
from sdrt.serve.gallery import IMAGE_ID, Gallery, GalleryImage
from sdrt.serve.image_encoding import MAX_PIXELS
from sdrt.serve.strict_json import StrictRoute
from sdrt.serve.thumbnails import encode_thumbnail

router = APIRouter(prefix="/v1/gallery", route_class=StrictRoute)

MAX_WORDS_LENGTH = 1000


@router.get("")
async def list_gallery(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    before: Annotated[str | None, Query(pattern=IMAGE_ID.pattern, max_length=40)] = None,
    q: Annotated[str, Query(max_length=MAX_WORDS_LENGTH)] = "",
) -> Response:
    """The images, newest first; of `q`, all words are in their settings. `before` is the id that
    the page before ended with. `enabled` is false where a server has no gallery.
    """
    context, owner = get_context(request), get_owner(request)
    if context.gallery is None:
        return json_response({"object": "list", "enabled": False, "data": [], "has_more": False})
    described = await context.run_in_thread(_list, context.gallery, owner, q, before, limit)
    return json_response(described)


def _list(
    gallery: Gallery, owner: str, words: str, before: str | None, limit: int
) -> dict[str, Any]:
    images = gallery.search(owner, words, before)
    data = [
        {
            "id": image.id,
            "object": "gallery.image",
            "url": f"/v1/gallery/{image.id}",
            "thumbnail_url": f"/v1/gallery/{image.id}/thumbnail",
            "size_bytes": image.size_bytes,
            "parameters": gallery.read_parameters(owner, image),
        }
        for image in images[:limit]
    ]
    return {"object": "list", "enabled": True, "data": data, "has_more": len(images) > limit}


def _find(request: Request, day: str, name: str) -> tuple[Gallery, str, GalleryImage]:
    """The image of an id, which is looked up and never becomes part of a path."""
    gallery, owner = get_context(request).gallery, get_owner(request)
    image = gallery.find(owner, f"{day}/{name}") if gallery else None
    if gallery is None or image is None:
        raise ApiError(404, f"unknown image {f'{day}/{name}'[:80]!r}", code="image_not_found")
    return gallery, owner, image


@router.get("/{day}/{name}")
async def get_gallery_image(request: Request, day: str, name: str) -> Response:
    """One image, a PNG file with its settings."""
    gallery, owner, image = _find(request, day, name)
    content = await get_context(request).run_in_thread(_read, gallery, owner, image)
    return Response(content, media_type="image/png")


@router.get("/{day}/{name}/thumbnail")
async def get_gallery_thumbnail(request: Request, day: str, name: str) -> Response:
    """One image as a small JPEG."""
    gallery, owner, image = _find(request, day, name)
    content = await get_context(request).run_in_thread(_read_thumbnail, gallery, owner, image)
    return Response(content, media_type="image/jpeg")


@router.delete("/{day}/{name}")
async def delete_gallery_image(request: Request, day: str, name: str) -> Response:
    """Delete one image."""
    gallery, owner, image = _find(request, day, name)
    await get_context(request).run_in_thread(gallery.remove, owner, image.id)
    return json_response({"id": image.id, "object": "gallery.image.deleted", "deleted": True})


def _read(gallery: Gallery, owner: str, image: GalleryImage) -> bytes:
    try:
        return gallery.read(owner, image.id)
    except FileNotFoundError:  # deleted by hand
        raise ApiError(404, f"unknown image {image.id!r}", code="image_not_found") from None


def _read_thumbnail(gallery: Gallery, owner: str, image: GalleryImage) -> bytes:
    content = _read(gallery, owner, image)
    return encode_thumbnail(convert_to_rgb(image_from_bytes(content, MAX_PIXELS)))
