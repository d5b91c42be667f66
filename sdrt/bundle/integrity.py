"""Verifies that a bundle's files are those that were built, by size and hash.

A file is hashed once; the result is cached in `$SDRT_HOME/verified.json` until the file changes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from sdrt.atomic_files import atomic_file, file_identity
from sdrt.errors import BundleError

from .manifest import MANIFEST, WEIGHTS, Component, FileRecord
from .onnx_check import check_graph
from .store import home

PROGRESS = ".progress"  # of a build, in its unfinished folder


def check_files(
    folder: Path,
    files: Mapping[str, FileRecord],
    graphs: Mapping[str, Component] | None = None,
    rehash: bool = False,
) -> None:
    """Verify files and validate graphs. Both are done once and cached for as long as neither the
    file nor its weights change.

    graphs: the graphs to validate, and the component of each
    rehash: hash all files, whatever the cache says
    """
    known = {} if rehash else _load_verified()
    fresh = {}
    for name, record in files.items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError as error:
            raise BundleError(
                f"{path} is missing", hint="build the bundle again with --force"
            ) from error
        mark = _fingerprint(stat, name, files)
        if known.get(str(path.resolve())) == mark:
            continue
        if stat.st_size != record.size or _hash_file(path) != record.sha256:
            forget_verified([str(path.resolve())])
            raise BundleError(
                f"{path} is damaged: {_describe_damage(stat.st_size, record)}",
                hint="build the bundle again with --force",
            )
        if graphs and path.suffix == ".onnx":
            check_graph(path, graphs[name])
        fresh[str(path.resolve())] = mark
    if fresh:
        _update_verified(lambda known: known | fresh)


def _describe_damage(size: int, record: FileRecord) -> str:
    if size != record.size:
        return f"it has {size} bytes, {record.size} were built"
    return "its sha256 is not that of the file that was built"


def mark_verified(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Record files that this process wrote and hashed as verified."""
    fresh = {}
    for name in files:
        path = folder / name
        with contextlib.suppress(OSError):
            fresh[str(path.resolve())] = _fingerprint(path.stat(), name, files)
    if fresh:
        _update_verified(lambda known: known | fresh)


def _fingerprint(stat: os.stat_result, name: str, files: Mapping[str, FileRecord]) -> str:
    """Changes when a file does, or the weights that it refers to."""
    record = files[name]
    weights = files.get(str(Path(name).with_name(WEIGHTS)), record)
    return f"{file_identity(stat)}:{record.sha256}:{weights.sha256}"


def forget_verified(paths: Iterable[str]) -> None:
    """Hash these files when they are opened next, whatever their time stamps say."""
    gone = set(paths)
    if gone & _load_verified().keys():
        _update_verified(lambda known: {path: known[path] for path in known.keys() - gone})


def stale_entries() -> list[str]:
    """Cached files that were deleted or changed."""

    def changed(path: str, mark: str) -> bool:
        try:
            return not str(mark).startswith(file_identity(Path(path).stat()))
        except (OSError, ValueError):
            return True

    return [path for path, mark in _load_verified().items() if changed(path, mark)]


def _hash_file(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def _load_verified() -> dict[str, str]:
    try:
        known = json.loads(_cache_path().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _update_verified(change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Atomically update the cache of verified files. Where it cannot be written, files are hashed
    again next time.
    """
    with contextlib.suppress(OSError), atomic_file(_cache_path()) as partial:
        partial.write_text(json.dumps(change(_load_verified())))


def _cache_path() -> Path:
    return home() / "verified.json"


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> Iterator[Path]:
    """Every file of a folder except the manifest, the plans and a build's progress, sorted."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative.parts[0] not in (MANIFEST, "plans", PROGRESS):
            yield path


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file, for the manifest."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, hash_file(path))
        for path in list_files(folder)
    }
