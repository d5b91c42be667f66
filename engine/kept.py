"""What an engine makes of a component once and reads from then on, kept in the user's folder.

Never kept in the bundle, which may come from elsewhere. A cache: where none can be kept, or none
pays, the caller does without. Knows the folder and what it was made of; not what is in it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from sdrt.bundle import WEIGHTS, Bundle, check_files, describe_files, graph_name, home
from sdrt.errors import SdrtError
from sdrt.folders import made_once
from sdrt.manifest import FileRecord
from sdrt.reading import read_json

log = logging.getLogger(__name__)
MARK = "plan.json"
WORTH = 100_000_000  # bytes of weights; smaller ones are made in a moment
ROOM = 2  # times the weights must be free on the disk


def kept(
    bundle: Bundle,
    component: str,
    maker: str,
    make: Callable[[Path], object],
    wanted: set[str],
    depends: Sequence[str] = (),
) -> Path | None:
    """The folder of what is made of a component; None where it does not pay or cannot be had.

    maker: who makes it, the name of a folder; make: writes the `wanted` files, and others, into the
    folder it is given; depends: what decides about the outcome besides graph and weights
    """
    weights = bundle.manifest.files.get(f"{component}/{WEIGHTS}")
    if weights is None or weights.size < WORTH:
        return None
    folder = home() / "plans" / maker
    made_of = _made_of(bundle, component)
    key = hashlib.sha256("\n".join((*made_of, *depends)).encode()).hexdigest()[:16]
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
            made_once(target, partial(_make, make, made_of))
    except (OSError, SdrtError) as error:
        log.warning("%s: what is made of it cannot be kept: %s", component, error)
        return None
    return target


def _made_of(bundle: Bundle, component: str) -> list[str]:
    """sha256 of the graph and of the weights."""
    names = (graph_name(component, bundle.graph_file), f"{component}/{WEIGHTS}")
    return [bundle.manifest.files[name].sha256 for name in names]


def _make(make: Callable[[Path], object], made_of: list[str], folder: Path) -> None:
    make(folder)
    records = {name: asdict(record) for name, record in describe_files(folder).items()}
    (folder / MARK).write_text(json.dumps({"of": made_of, "files": records}, indent=2) + "\n")


def _is_whole(folder: Path, wanted: set[str]) -> bool:
    try:
        records = read_json(folder / MARK)["files"]
        check_files(folder, {name: FileRecord(**record) for name, record in records.items()})
    except (SdrtError, KeyError, TypeError, AttributeError):
        return False
    return wanted <= set(records)
