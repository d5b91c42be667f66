"""The gallery: generated images in a folder, by day, with their settings in the files.

Knows files; no engines and no requests. One process at a time uses a folder.
"""

import logging
import re
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from PIL.Image import Image

from sdrt.atomic_files import write_atomic
from sdrt.errors import SdrtError, UsageError
from sdrt.runtime.images import image_from_bytes, image_to_bytes, read_parameters

from .folders import claim_folder
from .image_encoding import MAX_PIXELS
from .settings import Settings

log = logging.getLogger("sdrt.serve")

IMAGE_ID = re.compile(r"(\d{4}-\d{2}-\d{2})/(\d{12}-[0-9a-f]{8})", re.ASCII)
MAX_FILE_BYTES = 256 * 2**20
OWNER_DIGITS = 16


@dataclass(slots=True)
class GalleryImage:
    """A stored image.

    Attributes:
        id: `DAY/TIME-RANDOM`; also its path in the owner's folder, without `.png`.
        size_bytes: Of the file.
        parameters: Its settings; None before they are read.
    """

    id: str
    size_bytes: int
    parameters: str | None = None


def open_gallery(settings: Settings) -> "Gallery | None":
    """The gallery of a server that has a folder for it; raises UsageError if it is unusable."""
    if settings.gallery_folder is None:
        return None
    gallery = Gallery(settings.gallery_folder, settings.gallery_bytes)
    gallery.open()
    return gallery


@dataclass(slots=True)
class Gallery:
    """The images of a folder. With API keys each key has its own, in a folder named by the
    beginning of the key's digest.

    Attributes:
        folder: Created if it is missing.
        max_bytes: The oldest images are removed to stay within it.
    """

    folder: Path
    max_bytes: int
    _images: dict[str, dict[str, GalleryImage]] = field(default_factory=dict)  # by owner, by id
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _lock: ExitStack = field(default_factory=ExitStack)
    _writer: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "sdrt-gallery")
    )

    def open(self) -> None:
        """List the folder.

        Raises:
            UsageError: The folder cannot be used, or another server uses it.
        """
        claim_folder(self.folder, self._lock, "as gallery", "--gallery")
        for pattern in ("", "key-*/"):
            for path in sorted(self.folder.glob(f"{pattern}????-??-??/*.png")):
                self._list_file(path)

    def _list_file(self, path: Path) -> None:
        """List a file if it has a name of the gallery and no link leads out of the folder."""
        image_id = f"{path.parent.name}/{path.stem}"
        inside = path.resolve().is_relative_to(self.folder.resolve())
        if inside and path.is_file() and IMAGE_ID.fullmatch(image_id):
            place = path.parent.parent
            owner = "" if place == self.folder else place.name.removeprefix("key-")
            image = GalleryImage(image_id, path.stat().st_size)
            self._images.setdefault(owner, {})[image_id] = image

    def close(self) -> None:
        """Wait until all images are stored; let another process use the folder."""
        self._writer.shutdown()
        self._lock.close()

    def add_later(self, owner: str, image: Image, parameters: str) -> None:
        """Store an image in the background; a failure is logged."""
        self._writer.submit(self._add, owner[:OWNER_DIGITS], image, parameters)

    def _add(self, owner: str, image: Image, parameters: str) -> None:
        now = datetime.now()
        image_id = f"{now:%Y-%m-%d/%H%M%S%f}-{secrets.token_hex(4)}"  # in the order of time
        stored = GalleryImage(image_id, 0, parameters)
        try:
            content = image_to_bytes(image, parameters)
            stored.size_bytes = len(content)
            if len(content) > self.max_bytes:
                raise UsageError(f"its {len(content)} bytes exceed the gallery's {self.max_bytes}")
            self._make_room(len(content))
            path = self._path(owner, stored.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        except (OSError, SdrtError) as error:
            log.warning("An image was not stored in the gallery: %s", error)
            return
        with self._mutex:
            self._images.setdefault(owner, {})[stored.id] = stored

    def _make_room(self, size_bytes: int) -> None:
        """Remove the oldest images of all owners, until so many bytes fit."""
        with self._mutex:
            every = [(i, owner) for owner, own in self._images.items() for i in own.values()]
        total = sum(image.size_bytes for image, _ in every)
        for image, owner in sorted(every, key=lambda item: item[0].id):
            if total + size_bytes <= self.max_bytes:
                return
            self.remove(owner, image.id)
            total -= image.size_bytes

    def _path(self, owner: str, image_id: str) -> Path:
        """Of a listed image, or of a new one: ids of clients are looked up, never joined."""
        place = self.folder / f"key-{owner}" if owner else self.folder
        return place / f"{image_id}.png"

    def find(self, owner: str, image_id: str) -> GalleryImage | None:
        """An image of one owner."""
        with self._mutex:
            return self._images.get(owner[:OWNER_DIGITS], {}).get(image_id)

    def search(self, owner: str, words: str = "", before: str | None = None) -> list[GalleryImage]:
        """The images of one owner, newest first.

        Args:
            owner: The digest of an API key, or empty.
            words: All of them are in the images' settings, in any case.
            before: Only older images than that of this id.
        """
        with self._mutex:
            own = list(self._images.get(owner[:OWNER_DIGITS], {}).values())
        own.sort(key=lambda image: image.id, reverse=True)
        sought = words.casefold().split()
        return [
            image
            for image in own
            if (before is None or image.id < before)
            and (not sought or _contains(self.read_parameters(owner, image), sought))
        ]

    def read_parameters(self, owner: str, image: GalleryImage) -> str:
        """The settings in an image's file; empty where there are none."""
        if image.parameters is None:
            try:
                content = self.read(owner, image.id)
                image.parameters = read_parameters(image_from_bytes(content, MAX_PIXELS))
            except (OSError, SdrtError) as error:
                log.warning("Cannot read %s of the gallery: %s", image.id, error)
                image.parameters = ""
        return image.parameters

    def read(self, owner: str, image_id: str) -> bytes:
        """The file of a listed image; raises OSError, and UsageError for one that is too large."""
        path = self._path(owner[:OWNER_DIGITS], image_id)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path.name} exceeds {MAX_FILE_BYTES} bytes")
        return path.read_bytes()

    def remove(self, owner: str, image_id: str) -> None:
        """Delete a listed image; raises OSError."""
        owner = owner[:OWNER_DIGITS]
        path = self._path(owner, image_id)
        path.unlink(missing_ok=True)
        with self._mutex:
            self._images.get(owner, {}).pop(image_id, None)


def _contains(text: str, words: Sequence[str]) -> bool:
    folded = text.casefold()
    return all(word in folded for word in words)
