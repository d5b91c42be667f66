"""The bundle: a folder with ONNX graphs, one copy of the weights, and a manifest that names it all.

Knows files and hashes; not what a graph computes. `sdrt.json` is written last and read first: a
folder without it is not a bundle. One from elsewhere holds nothing but what its manifest lists.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdrt.atomic_files import beside, identity, locked, whole
from sdrt.errors import BundleError, UsageError
from sdrt.json_validation import read_json

from .manifest import (
    MANIFEST,
    MOST_MANIFEST,
    SHALLOW,
    Component,
    FileRecord,
    Manifest,
    manifest_from_json,
)
from .onnx_check import check_graph

# What a bundle's safetensors files say of themselves, and how a transposed weight's name ends.
NAMES = {"names": "checkpoint"}
TRANSPOSED = ".T"
FLOAT32_GRAPH = "float32.onnx"
WEIGHTS = "model.safetensors"
# A UNet's layers nearest to its input and output lie beside it: its weights are theirs.
SHALLOW_GRAPH = "shallow.onnx"
# All that a bundle may hold beside graphs and their weights.
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
SMALL_FILES = {f"tokenizer{which}/{name}" for which in ("", "_2") for name in TOKENIZER_FILES}
SMALL_FILES |= {"scheduler/scheduler_config.json", "proof.json"}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder and its manifest."""

    folder: Path
    manifest: Manifest = field(repr=False)
    graph_file: str = "model.onnx"

    def json(self, path: str) -> dict[str, Any]:
        """One of the bundle's JSON files, such as `scheduler/scheduler_config.json`."""
        return read_json(self.folder / path)

    def graph(self, component: str) -> Path:
        """The component's ONNX file; raises BundleError if the bundle does not have it."""
        if component not in self.manifest.components:
            have = ", ".join(self.manifest.components)
            raise BundleError(f"{self.folder} has no {component}; it has {have}")
        return self.folder / graph_name(component, self.graph_file)

    def in_float32(self, component: str) -> "Bundle | None":
        """The same with the graph of a half-precision component that computes in float32, from the
        same weights, inputs and outputs alike; None if the bundle has none.
        """
        has = f"{component}/{FLOAT32_GRAPH}" in self.manifest.files
        return replace(self, graph_file=FLOAT32_GRAPH) if has else None

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.manifest.files.values())


def graph_name(component: str, file: str = "model.onnx") -> str:
    """Where a component's graph is in a bundle."""
    return f"unet/{SHALLOW_GRAPH}" if component == SHALLOW else f"{component}/{file}"


def home() -> Path:
    """Where bundles live: `$SDRT_HOME`, else `sdrt` in the user's cache folder."""
    if folder := os.environ.get("SDRT_HOME"):
        return Path(folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "sdrt"


def bundles_folder() -> Path:
    return home() / "bundles"


def embedded(name: str) -> Path:
    """Where a bundle shipped with the package would be."""
    return Path(__file__).parent.parent / "models" / f"{name}.bundle"


def list_bundles() -> list[Path]:
    """Folders of all bundles built here, newest first, then the ones shipped with the package."""
    for old in bundles_folder().glob(".*.old"):
        _put_back(old.with_name(old.name[1 : -len(".old")]))
    # What begins with a dot is not finished.
    built = [path.parent for path in bundles_folder().glob(f"[!.]*/{MANIFEST}")]
    built.sort(key=lambda folder: (folder / MANIFEST).stat().st_mtime, reverse=True)
    shipped = sorted(path.parent for path in embedded("x").parent.glob(f"*.bundle/{MANIFEST}"))
    return built + shipped


def find_bundle(name: str | os.PathLike[str] | None) -> Path:
    """The folder of the bundle called `name`, a folder's path, or the newest one for None."""
    if name is None:
        if found := list_bundles():
            return found[0]
        raise BundleError("no bundle has been built yet; type: sdrt build --model shapes")
    for folder in (Path(name).expanduser(), bundles_folder() / name, embedded(str(name))):
        _put_back(folder)
        try:
            if (folder / MANIFEST).is_file():
                return folder
        except OSError as error:
            raise BundleError(f"{folder} cannot be read: {error.strerror}") from error
    names = sorted({folder.stem for folder in list_bundles()})
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"type: sdrt build --model {name}"
    raise BundleError(
        f"no bundle called {str(name)!r}: neither a folder with {MANIFEST} nor one of those built "
        f"here ({', '.join(names) or 'none'}); {hint}"
    )


def _put_back(folder: Path) -> None:
    """Where a build that replaced a bundle was cut off between two renames, end that."""
    with contextlib.suppress(OSError):
        if folder.name and not folder.exists() and beside(folder, "old").exists():
            from sdrt.folders import restore

            with locked(folder):
                restore(folder)


def open_bundle(name: str | os.PathLike[str] | None = None) -> Bundle:
    """Read and check a bundle; raises BundleError: missing, damaged, of another format."""
    folder = find_bundle(name)
    raw = read_json(folder / MANIFEST, most=MOST_MANIFEST)
    manifest = manifest_from_json(raw, folder / MANIFEST)
    check_listed(folder, manifest)
    check_files(folder, manifest.files, graphs_of(manifest))
    return Bundle(folder, manifest)


def check_listed(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError unless the folder's parts hold the files that the manifest lists, and no
    others, which nobody vouches for. Plans are not the bundle's: they are known by their sidecars.

    Links that lead outside are refused, and what is no file; hard links are not, since a copy may
    be made of them and what they hold is compared with the manifest.
    """
    graphs = graphs_of(manifest)
    weights = {str(Path(graph).with_name(WEIGHTS)) for graph in graphs}
    needed = {graph_name(part) for part in manifest.components} | weights
    if missing := sorted(needed - set(manifest.files)):
        raise BundleError(f"{folder / MANIFEST} is not a manifest: it lists no {missing[0]}")
    if unused := sorted(set(manifest.files) - set(graphs) - weights - SMALL_FILES):
        raise BundleError(f"{folder / MANIFEST} lists {unused[0]}, which no bundle has")
    inside = folder.resolve()
    for name in manifest.files:
        path = (folder / name).resolve()
        if not path.is_relative_to(inside):
            raise BundleError(f"{folder / name} is a link to {path}, outside of the bundle")
        if path.exists() and not path.is_file():
            raise BundleError(f"{folder / name} is no file")
    for top in sorted({name.split("/")[0] for name in manifest.files}):
        for found in sorted((folder / top).rglob("[!.]*")):
            name = found.relative_to(folder).as_posix()
            if name not in manifest.files and not found.is_dir():
                raise BundleError(f"{found} is not in {MANIFEST}; delete it, or build again")


def graphs_of(manifest: Manifest) -> dict[str, Component]:
    """Every graph that a bundle may hold, and the component whose inputs and outputs it has."""
    parts = manifest.components.items()
    made = {graph_name(part, FLOAT32_GRAPH): component for part, component in parts}
    return made | {graph_name(part): component for part, component in parts}


def check_files(
    folder: Path,
    files: Mapping[str, FileRecord],
    graphs: Mapping[str, Component] | None = None,
    anew: bool = False,
) -> None:
    """Compare files with what is known of them, and look into graphs; both are done once and
    remembered for as long as neither the file nor its weights change.

    graphs: the files to look into, and the component of each
    anew: hash all, whatever is remembered
    """
    known = {} if anew else _remembered()
    fresh = {}
    for name, record in files.items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError as error:
            raise BundleError(f"{path} is missing; build the bundle again with --force") from error
        mark = _mark(stat, name, files)
        if known.get(str(path.resolve())) == mark:
            continue
        if stat.st_size != record.size or _sha256_of_part(path) != record.sha256:
            forget([str(path.resolve())])
            raise BundleError(
                f"{path} is damaged: its bytes are not those that were built "
                f"({stat.st_size} bytes found, {record.size} expected, or another sha256); "
                "build the bundle again with --force"
            )
        if graphs and path.suffix == ".onnx":
            check_graph(path, graphs[name])
        fresh[str(path.resolve())] = mark
    if fresh:
        _remember(lambda known: known | fresh)


def remember(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """What was written and hashed by this process, and is no graph of a stranger, is known."""
    fresh = {}
    for name in files:
        path = folder / name
        with contextlib.suppress(OSError):
            fresh[str(path.resolve())] = _mark(path.stat(), name, files)
    if fresh:
        _remember(lambda known: known | fresh)


def _mark(stat: os.stat_result, name: str, files: Mapping[str, FileRecord]) -> str:
    """What changes when a file does, or the weights that it speaks of."""
    record = files[name]
    weights = files.get(str(Path(name).with_name(WEIGHTS)), record)
    return f"{identity(stat)}:{record.sha256}:{weights.sha256}"


def forget(paths: Iterable[str]) -> None:
    """Hash these files when they are next opened, whatever their times say."""
    gone = set(paths)
    if gone & _remembered().keys():
        _remember(lambda known: {path: known[path] for path in known.keys() - gone})


def changed_memory() -> list[str]:
    """The remembered files that are gone or not as they were."""

    def changed(path: str, mark: str) -> bool:
        try:
            return not str(mark).startswith(identity(Path(path).stat()))
        except (OSError, ValueError):
            return True

    return [path for path, mark in _remembered().items() if changed(path, mark)]


def _sha256_of_part(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(_memory().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Make of what is known what is known now; nobody else's change comes between. A cache: where
    it cannot be written, files are hashed again next time.
    """
    with contextlib.suppress(OSError), whole(_memory()) as partial:
        partial.write_text(json.dumps(change(_remembered())))


def _memory() -> Path:
    return home() / "verified.json"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_size(text: str) -> tuple[int, int]:
    """`"512x768"` -> (512, 768): width and height in pixels, each a multiple of 8 from 16 on."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if not match:
        raise UsageError(f"size {text!r} is not WIDTHxHEIGHT; type for example --size 512x512")
    width, height = int(match[1]), int(match[2])
    for side in (width, height):
        if side % 8 or not 16 <= side <= 8192:
            near = min(max(16, round(side / 8) * 8), 8192)
            raise UsageError(
                f"size {text!r}: {side} is not a multiple of 8 from 16 to 8192; nearest: {near}"
            )
    return width, height


def files_of(folder: Path) -> Iterator[Path]:
    """Every file of a folder except the manifest and the plans, sorted."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative.parts[0] not in (MANIFEST, "plans"):
            yield path


def describe_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file, for the manifest."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of(path))
        for path in files_of(folder)
    }
