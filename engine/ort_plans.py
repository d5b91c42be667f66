"""Graphs that ONNX Runtime has optimised for this processor, kept in the user's folder.

Optimising a large UNet and packing its weights takes ten times as long as reading the outcome,
which is mapped into memory: processes share it. Attention is fused first (`ort_fused`, if onnx is
installed): its scores, gigabytes at 512x512, are then never whole. Never kept in the bundle, which
may come from elsewhere. A cache: where none can be kept, or none pays, the bundle's own graph is
what runs.
"""

import contextlib
import hashlib
import json
import logging
import platform
import shutil
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.bundle import Bundle, check_files, describe_files, graph_name, home
from sdrt.errors import SdrtError
from sdrt.folders import made_once
from sdrt.manifest import FileRecord
from sdrt.reading import read_json

from .mapped import trim

if TYPE_CHECKING:
    import onnxruntime as ort

log = logging.getLogger(__name__)
PREFIX = "cpu-onnxruntime"
GRAPH, WEIGHTS, MARK = "model.onnx", "model.data", "plan.json"
WORTH = 100_000_000  # bytes of weights; smaller ones are optimised in a moment
ROOM = 2  # times the weights must be free on the disk


def optimised(bundle: Bundle, component: str, options: "ort.SessionOptions") -> Path | None:
    """The optimised graph of a component, made where there is none yet; None where the bundle's
    own is to be used.
    """
    weights = bundle.manifest.files.get(f"{component}/model.safetensors")
    if weights is None or weights.size < WORTH:
        return None
    folder = home() / "plans" / f"{PREFIX}{installed()}"
    target = folder / f"{component}-{_key(bundle, component)}"
    try:
        if target.exists() and not _is_whole(target):
            log.warning("%s is damaged, so it is made again", target)
            shutil.rmtree(target)
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < ROOM * weights.size:
                log.info("%s: no room in %s to keep what is optimised", component, folder)
                return None
            log.info("%s: optimised once for this processor, kept in %s", component, folder)
            made_once(target, partial(_make, bundle, component, options))
    except (OSError, SdrtError) as error:
        log.warning("%s: its optimised graph cannot be kept: %s", component, error)
        return None
    return target / GRAPH


def installed() -> str | None:
    """The version of ONNX Runtime here."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return None


def _key(bundle: Bundle, component: str) -> str:
    """Of all that decides what ONNX Runtime makes: graph, weights, processor, what fuses."""
    parts = (*_made_of(bundle, component), _processor(), str(find_spec("onnx") is not None))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _made_of(bundle: Bundle, component: str) -> list[str]:
    """sha256 of the graph and of the weights."""
    names = (graph_name(component, bundle.graph_file), f"{component}/model.safetensors")
    return [bundle.manifest.files[name].sha256 for name in names]


@cache
def _processor() -> str:
    """What decides how weights are laid out: the system, and what the processor can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join((platform.system(), platform.machine(), platform.processor(), able))


def _make(bundle: Bundle, component: str, options: "ort.SessionOptions", folder: Path) -> None:
    from .ort import FUSED, session

    graph, fused = bundle.graph(component), None
    if find_spec("onnx"):
        from .ort_fused import write_fused

        write_fused(graph, folder / FUSED, norms=False)
        fused = (folder / FUSED).read_bytes()
    options.optimized_model_filepath = str(folder / GRAPH)
    for name, value in (
        ("session.optimized_model_external_initializers_file_name", WEIGHTS),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(name, value)
    session(component, graph, options, "CPUExecutionProvider", {}, fused)
    trim()
    records = {name: asdict(record) for name, record in describe_files(folder).items()}
    described = {"of": _made_of(bundle, component), "files": records}
    (folder / MARK).write_text(json.dumps(described, indent=2) + "\n")


def _is_whole(folder: Path) -> bool:
    try:
        records = read_json(folder / MARK)["files"]
        check_files(folder, {name: FileRecord(**record) for name, record in records.items()})
    except (SdrtError, KeyError, TypeError, AttributeError):
        return False
    return {GRAPH, WEIGHTS} <= set(records)
