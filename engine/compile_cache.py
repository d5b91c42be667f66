"""What an engine makes of a component once and reads from then on, kept in the user's folder.

Never kept in the bundle, which may come from elsewhere. A cache: where none can be kept, or none
pays, the caller does without. Knows the folder and what it was made of; not what is in it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdrt.atomic_files import build_once
from sdrt.bundle import Bundle
from sdrt.bundle.bundle import graph_name
from sdrt.bundle.integrity import check_files, describe_files, mark_verified
from sdrt.bundle.manifest import WEIGHTS, FileRecord
from sdrt.bundle.store import home
from sdrt.errors import SdrtError
from sdrt.json_validation import read_json

from .cpu import cpu_fingerprint

log = logging.getLogger(__name__)
MARK = "plan.json"
# Each maker's name, and the packages that it may come in.
MAKERS = {
    "onnxruntime": ("ONNX Runtime", ("onnxruntime", "onnxruntime-gpu")),
    "openvino": ("OpenVINO", ("openvino",)),
}
WORTH = 100_000_000  # bytes of weights; smaller ones are made in a moment
ROOM = 3  # times the weights must be free on the disk


def kept(
    bundle: Bundle,
    component: str,
    maker: str,
    make: Callable[[Path], object],
    wanted: set[str],
    depends: Sequence[str] = (),
) -> Path | None:
    """The folder of what is made of a component; None where it does not pay or cannot be had.

    maker: one of `MAKERS`; make: writes the `wanted` files, and others, into the folder it is given
    depends: what decides about the outcome besides graph, weights, maker and processor
    """
    weights = bundle.manifest.files.get(f"{component}/{WEIGHTS}")
    if weights is None or weights.size < WORTH:
        return None
    folder = home() / "plans" / f"cpu-{maker}{_installed(maker)}"
    made_of = _made_of(bundle, component)
    parts = (*made_of, cpu_fingerprint(), *depends)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    target = folder / f"{component}-{key}"
    try:
        if target.exists() and not _is_whole(target, wanted):
            log.warning("%s is damaged, so it is made again", target)
            shutil.rmtree(target)
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < ROOM * weights.size:
                log.info("%s: no room in %s to keep what is made of it", component, folder)
                return None
            log.info("%s: made ready once for this processor, kept in %s", component, folder)
            hashed: dict[str, FileRecord] = {}
            build_once(target, partial(_make, make, made_of, hashed))
            mark_verified(target, hashed)  # nothing where another process made it
    except (OSError, SdrtError) as error:
        log.warning("%s: what is made of it cannot be kept: %s", component, error)
        return None
    return target


def other_version(folder: str) -> str | None:
    """Why what is in a folder of this name is of no use here: another version of its maker made it;
    None if that is not so.
    """
    for maker, (title, _) in MAKERS.items():
        made_by = folder.removeprefix(f"cpu-{maker}")
        if made_by != folder and (here := _installed(maker)) and made_by != here:
            return f"of {title} {made_by}, here is {here}"
    return None


def _installed(maker: str) -> str | None:
    for package in MAKERS[maker][1]:
        with suppress(PackageNotFoundError):
            return version(package)
    return None


def _made_of(bundle: Bundle, component: str) -> list[str]:
    """sha256 of the graph and of the weights."""
    names = (graph_name(component, bundle.graph_file), f"{component}/{WEIGHTS}")
    return [bundle.manifest.files[name].sha256 for name in names]


def _make(
    make: Callable[[Path], object], made_of: list[str], hashed: dict[str, FileRecord], folder: Path
) -> None:
    make(folder)
    hashed |= describe_files(folder)
    records = {name: asdict(record) for name, record in hashed.items()}
    (folder / MARK).write_text(json.dumps({"of": made_of, "files": records}, indent=2) + "\n")


def _is_whole(folder: Path, wanted: set[str]) -> bool:
    try:
        records = read_json(folder / MARK)["files"]
        check_files(folder, {name: FileRecord(**record) for name, record in records.items()})
    except (SdrtError, KeyError, TypeError, AttributeError):
        return False
    return wanted <= set(records)
