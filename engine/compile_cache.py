"""On-disk compile cache: what a backend compiles from a component once, stored per user.

It is never stored in the bundle, which may come from elsewhere. It is a cache: where nothing can be
stored, or it would not pay, the caller works without it. Knows the folder and what its content was
compiled from; not the content.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from sdrt.atomic_files import build_once
from sdrt.bundle import Bundle
from sdrt.bundle.bundle import graph_name, weights_name
from sdrt.bundle.integrity import check_files, describe_files, mark_verified
from sdrt.bundle.manifest import SHALLOW, FileRecord
from sdrt.bundle.store import home
from sdrt.errors import SdrtError
from sdrt.json_validation import read_json

from .cpu import cpu_fingerprint

log = logging.getLogger(__name__)
METADATA = "plan.json"
# Every compiler's title, and the packages that it may come in.
COMPILERS = {
    "onnxruntime": ("ONNX Runtime", ("onnxruntime", "onnxruntime-gpu")),
    "openvino": ("OpenVINO", ("openvino",)),
}
MIN_WEIGHT_BYTES = 100_000_000  # smaller components compile in a moment
DISK_FACTOR = 3  # times the weights' size that must be free on the disk


def get_or_compile(
    bundle: Bundle,
    component: str,
    compiler: str,
    compile_into: Callable[[Path], object],
    files: set[str],
    depends: Sequence[str] = (),
) -> Path | None:
    """The folder of a compiled component, compiled now if it is not in the cache.

    Args:
        bundle: The bundle.
        component: The component's name.
        compiler: A name of `COMPILERS`.
        compile_into: Writes `files`, and possibly others, into the folder that it is passed.
        files: What the folder must contain.
        depends: What decides about the result besides graph, weights, compiler and processor.

    Returns:
        The folder; None where caching does not pay or is not possible.
    """
    weights = bundle.manifest.files.get(weights_name(component))
    if component == SHALLOW or weights is None or weights.size < MIN_WEIGHT_BYTES:
        return None
    folder = home() / "plans" / f"cpu-{compiler}{_installed_version(compiler)}"
    sources = _source_hashes(bundle, component)
    key = hashlib.sha256("\n".join((*sources, cpu_fingerprint(), *depends)).encode())
    target = folder / f"{component}-{key.hexdigest()[:16]}"
    try:
        if target.exists() and not _is_intact(target, files):
            log.warning("%s is damaged; compiling it again", target)
            shutil.rmtree(target)
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < DISK_FACTOR * weights.size:
                log.info("%s: not enough space in %s for the compile cache", component, folder)
                return None
            log.info("%s: compiling for this processor, once, into %s", component, folder)
            records: dict[str, FileRecord] = {}
            build_once(target, partial(_fill, compile_into, sources, records))
            mark_verified(target, records)  # empty if another process compiled it
    except (OSError, SdrtError) as error:
        log.warning("%s cannot be stored in the compile cache: %s", component, error)
        return None
    return target


def explain_stale(folder: str) -> str | None:
    """Why a cache folder of this name is useless here: another version of its compiler filled it.
    None if that is not so.
    """
    for compiler, (title, _) in COMPILERS.items():
        cached = folder.removeprefix(f"cpu-{compiler}")
        if cached != folder and (installed := _installed_version(compiler)) != cached:
            return f"of {title} {cached}, here is {installed}" if installed else None
    return None


def _installed_version(compiler: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, rarely needed

    for package in COMPILERS[compiler][1]:
        with suppress(PackageNotFoundError):
            return version(package)
    return None


def _source_hashes(bundle: Bundle, component: str) -> list[str]:
    """sha256 of the graph and of the weights."""
    names = (graph_name(component, bundle.graph_file), weights_name(component))
    return [bundle.manifest.files[name].sha256 for name in names]


def _fill(
    compile_into: Callable[[Path], object],
    sources: list[str],
    records: dict[str, FileRecord],
    folder: Path,
) -> None:
    compile_into(folder)
    records |= describe_files(folder)
    files = {name: asdict(record) for name, record in records.items()}
    (folder / METADATA).write_text(json.dumps({"of": sources, "files": files}, indent=2) + "\n")


def _is_intact(folder: Path, files: set[str]) -> bool:
    try:
        records = read_json(folder / METADATA)["files"]
        check_files(folder, {name: FileRecord(**record) for name, record in records.items()})
    except (SdrtError, KeyError, TypeError, AttributeError):
        return False
    return files <= set(records)
