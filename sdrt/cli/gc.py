"""`sdrt gc`: lists and deletes what interrupted builds, other GPUs and deleted bundles have left.

Knows names, locks and plans' sidecars. Bundles are not touched, nor anything that is locked. Images
are written where users choose; a partial file there is replaced by the next one of its name.
"""

import argparse
import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.atomic_files import is_locked, locked
from sdrt.bundle import Bundle
from sdrt.bundle.embedded import embedded_folder, embedded_names, embedded_net_names
from sdrt.bundle.integrity import forget_verified, stale_entries
from sdrt.bundle.manifest import read_manifest
from sdrt.bundle.store import bundles_folder, home, list_bundles
from sdrt.engine.compile_cache import METADATA, explain_stale
from sdrt.engine.gpu import GpuInventory, detect_gpus
from sdrt.engine.plans import Plan, plan_from_json, plans_folder
from sdrt.engine.tensorrt.variants import MODULES
from sdrt.errors import BundleError, SdrtError
from sdrt.json_validation import read_json

from .inspect import megabytes

log = logging.getLogger(__name__)
REASONS = {
    ".partial": "partial output of an interrupted build of {}",
    ".old": "the replaced version of {}",
    ".lock": "a lock that nobody holds",
}


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file, a folder, or a plan with its sidecar, and why it is not needed."""

    path: Path
    reason: str

    @property
    def target(self) -> Path:
        """What it belongs to, and whose lock is held to delete it."""
        if self.path.suffix in REASONS:
            return self.path.with_name(self.path.stem.removeprefix("."))
        return self.path.with_name(self.path.name.partition("-")[0])

    @property
    def files(self) -> list[Path]:
        if self.path.suffix == ".plan":
            both = (self.path, self.path.with_suffix(".json"))
            return [path for path in both if path.is_file()]
        inside = self.path.rglob("*") if self.path.is_dir() else iter([self.path])
        return [path for path in inside if path.is_file() and not path.is_symlink()]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def free(self) -> None:
        """Delete it; raises BlockingIOError if it is being rebuilt."""
        with locked(self.target, wait=False):
            if self.path.suffix == ".plan":
                for path in reversed(self.files):  # a plan without its sidecar is no plan
                    path.unlink()
            elif self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)


def collect_garbage(args: argparse.Namespace) -> None:
    """Print leftovers, or JSON; with `--yes` delete them."""
    unused, stale = list(leftovers(detect_gpus())), stale_entries()
    described: list[dict[str, Any]] = [
        {"path": str(f.path), "bytes": f.bytes, "reason": f.reason} for f in unused
    ]
    if stale:
        reason = f"{len(stale)} cached checks of files that were deleted or changed"
        described.append({"path": str(home() / "verified.json"), "bytes": 0, "reason": reason})
    if args.yes:
        _free(unused)
        forget_verified(stale)
    if not described and not args.json:
        print("Nothing to delete.")
        return
    total = sum(leftover.bytes for leftover in unused)
    if args.json:
        print(json.dumps({"leftovers": described, "bytes": total, "freed": args.yes}, indent=2))
        return
    for entry in described:
        print(f"{megabytes(entry['bytes']):>12}  {entry['path']}  ({entry['reason']})")
    verb = "freed" if args.yes else "to free; run `sdrt gc --yes`" if described else "to free"
    print(f"{megabytes(total):>12}  {verb}")


def _free(unused: list[Leftover]) -> None:
    for leftover in unused:
        try:
            leftover.free()
        except BlockingIOError:
            log.info("%s is being rebuilt; skipping", leftover.target)
        except OSError as error:
            raise SdrtError(f"failed to delete {leftover.path}: {error.strerror}") from error


def leftovers(machine: GpuInventory) -> Iterator[Leftover]:
    """Everything that can be deleted. machine: whose GPUs plans are for"""
    bundles = dict(_bundles())
    plans = {*bundles, *_subfolders(home() / "plans")}
    places = [home(), bundles_folder(), home() / "converted", *_subfolders(home() / "embedded")]
    places += [home() / "timing", *plans, *(folder for of in plans for folder in _subfolders(of))]
    for place in places:
        yield from _unfinished(place)
    for folder in sorted(plans):
        yield from _useless_plans(folder, bundles.get(folder), machine)
    yield from _useless_graphs(list(bundles.values()))
    yield from _outdated_embedded_models()


def _outdated_embedded_models() -> Iterator[Leftover]:
    names = (*embedded_names(), *embedded_net_names())
    current = {embedded_folder(name, home()).parent for name in names}
    for folder in _subfolders(home() / "embedded"):
        if folder not in current:
            yield Leftover(folder, "the embedded model of another version of sdrt")


def _bundles() -> Iterator[tuple[Path, Bundle]]:
    """Every bundle whose manifest can be read, by the folder of its plans."""
    for folder in list_bundles():
        try:
            manifest = read_manifest(folder)
        except BundleError:  # nothing is known of its plans, so they stay
            continue
        bundle = Bundle(folder, manifest)
        yield plans_folder(bundle), bundle


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _unfinished(place: Path) -> Iterator[Leftover]:
    for path in sorted(place.iterdir()) if place.is_dir() else []:
        if path.name.startswith(".") and path.suffix in REASONS:
            leftover = Leftover(path, REASONS[path.suffix].format(path.stem[1:]))
            alone = path.suffix == ".old" and not leftover.target.exists()  # it is the bundle
            if not alone and not is_locked(leftover.target):
                yield leftover


def _useless_plans(
    folder: Path, bundle: Bundle | None, machine: GpuInventory
) -> Iterator[Leftover]:
    """Plans that nothing here can use, and parts of plans."""
    sidecars = set(folder.glob("*/*-*.json"))
    for sidecar in sorted(sidecars):
        try:
            plan = plan_from_json(sidecar)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # written by another version: it is left alone
        if not plan.path.is_file():
            yield Leftover(plan.path, "a sidecar without its plan")
        elif reason := _why_useless(plan, bundle, machine):
            yield Leftover(plan.path, reason)
    for path in sorted(folder.glob("*/*-*.plan")):
        leftover = Leftover(path, "a plan without its sidecar")
        if path.with_suffix(".json") not in sidecars and not is_locked(leftover.target):
            yield leftover


def _useless_graphs(bundles: list[Bundle]) -> Iterator[Leftover]:
    """What another version of an engine made, or what was made of what no bundle has."""
    known = {record.sha256 for bundle in bundles for record in bundle.manifest.files.values()}
    for mark in sorted((home() / "plans").glob(f"cpu-*/*/{METADATA}")):
        try:
            sources = set(read_json(mark).get("of", ()))
        except BundleError:
            continue
        if reason := explain_stale(mark.parent.parent.name):
            yield Leftover(mark.parent, reason)
        elif not sources <= known:
            yield Leftover(mark.parent, "for a graph or weights that no bundle has")


def _why_useless(plan: Plan, bundle: Bundle | None, machine: GpuInventory) -> str | None:
    """On a machine without a GPU plans may be made for others, so that theirs are not useless."""
    key, here = plan.key, f"{platform.system()}-{platform.machine()}".lower()
    if key.system != here:
        return f"for {key.system}, this is {here}"
    if (installed := _installed(key.kind)) and not installed.startswith(key.version):
        return f"of {key.kind} {key.version}, here is {installed}"
    if machine.gpus and not {gpu.sm for gpu in machine.gpus} & set(key.targets):
        return f"for {', '.join(key.targets)}, here is {machine.gpus[0].sm}"
    if machine.gpus and key.gpu and key.gpu not in {gpu.name for gpu in machine.gpus}:
        return f"for {key.gpu}, here is {machine.gpus[0].name}"
    if bundle and not _has(bundle, key.component, (key.graph, key.weights)):
        return "for a graph or weights that the bundle no longer has"
    return None


def _has(bundle: Bundle, component: str, hashes: tuple[str, ...]) -> bool:
    files = bundle.manifest.files.items()
    known = {record.sha256 for name, record in files if name.startswith(f"{component}/")}
    return set(hashes) <= known


def _installed(kind: str) -> str | None:
    try:
        return importlib.metadata.version(MODULES[kind])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None
