"""Whether a bundle's files are those that were built: sizes and hashes, and what is known of them.

A file is hashed once; the outcome is kept in `$SDRT_HOME/verified.json` until the file changes.
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


def check_files(
    folder: Path,
    files: Mapping[str, FileRecord],
    graphs: Mapping[str, Component] | None = None,
    rehash: bool = False,
) -> None:
    """Compare files with what is known of them, and look into graphs; both are done once and
    remembered for as long as neither the file nor its weights change.

    graphs: the files to look into, and the component of each
    anew: hash all, whatever is remembered
    """
    known = {} if rehash else _load_verified()
    fresh = {}
    for name, record in files.items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError as error:
            raise BundleError(f"{path} is missing; build the bundle again with --force") from error
        mark = _fingerprint(stat, name, files)
        if known.get(str(path.resolve())) == mark:
            continue
        if stat.st_size != record.size or _hash_file(path) != record.sha256:
            forget_verified([str(path.resolve())])
            raise BundleError(
                f"{path} is damaged: its bytes are not those that were built "
                f"({stat.st_size} bytes found, {record.size} expected, or another sha256); "
                "build the bundle again with --force"
            )
        if graphs and path.suffix == ".onnx":
            check_graph(path, graphs[name])
        fresh[str(path.resolve())] = mark
    if fresh:
        _update_verified(lambda known: known | fresh)


def mark_verified(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """What was written and hashed by this process, and is no graph of a stranger, is known."""
    fresh = {}
    for name in files:
        path = folder / name
        with contextlib.suppress(OSError):
            fresh[str(path.resolve())] = _fingerprint(path.stat(), name, files)
    if fresh:
        _update_verified(lambda known: known | fresh)


def _fingerprint(stat: os.stat_result, name: str, files: Mapping[str, FileRecord]) -> str:
    """What changes when a file does, or the weights that it speaks of."""
    record = files[name]
    weights = files.get(str(Path(name).with_name(WEIGHTS)), record)
    return f"{file_identity(stat)}:{record.sha256}:{weights.sha256}"


def forget_verified(paths: Iterable[str]) -> None:
    """Hash these files when they are next opened, whatever their times say."""
    gone = set(paths)
    if gone & _load_verified().keys():
        _update_verified(lambda known: {path: known[path] for path in known.keys() - gone})


def stale_entries() -> list[str]:
    """The remembered files that are gone or not as they were."""

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
    """Make of what is known what is known now; nobody else's change comes between. A cache: where
    it cannot be written, files are hashed again next time.
    """
    with contextlib.suppress(OSError), atomic_file(_cache_path()) as partial:
        partial.write_text(json.dumps(change(_load_verified())))


def _cache_path() -> Path:
    return home() / "verified.json"


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> Iterator[Path]:
    """Every file of a folder except the manifest and the plans, sorted."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative.parts[0] not in (MANIFEST, "plans"):
            yield path


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file, for the manifest."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, hash_file(path))
        for path in list_files(folder)
    }
