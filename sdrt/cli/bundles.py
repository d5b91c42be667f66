"""`sdrt list`, `sdrt use` and `sdrt remove`: the bundles of this user."""

import argparse
import json
import shutil
from typing import Any

from sdrt.atomic_files import locked
from sdrt.bundle import Bundle
from sdrt.bundle.bundle import check_makes_images
from sdrt.bundle.embedded import embedded_names, materialize
from sdrt.bundle.manifest import CONTROLNET, MANIFEST, T2I_ADAPTER, read_manifest
from sdrt.bundle.store import (
    bundle_name,
    bundles_folder,
    clear_default,
    default_name,
    find_bundle,
    home,
    set_default,
)
from sdrt.bundle.store import (
    list_bundles as list_folders,
)
from sdrt.engine.plans import plans_folder
from sdrt.errors import BundleError

NET_TITLES = {CONTROLNET: "ControlNet", T2I_ADAPTER: "T2I-Adapter"}


def describe_bundles() -> list[dict[str, Any]]:
    """Every bundle as plain values, the embedded ones where nothing was built.

    `error` is why a bundle cannot be read.
    """
    default = default_name()
    rows: list[dict[str, Any]] = []
    for folder in list_folders() or [materialize(name, home()) for name in embedded_names()]:
        row: dict[str, Any] = {"name": bundle_name(folder), "folder": str(folder)}
        row["default"] = folder.name == default
        try:
            manifest = read_manifest(folder)
        except BundleError as error:
            rows.append({**row, "error": error.message})
            continue
        bundle = Bundle(folder, manifest)
        rows.append(
            {
                **row,
                "source": manifest.source,
                "precision": bundle.precision,
                "control": manifest.control_net,
                "family": manifest.family,
                "sizes": [f"{width}x{height}" for width, height in manifest.sizes],
                "bytes": bundle.bytes,
                "error": None,
            }
        )
    return rows


def list_bundles(args: argparse.Namespace) -> None:
    """Print a table, or JSON."""
    rows = describe_bundles()
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        raise BundleError("no bundles", hint="run `sdrt build --model shapes`")
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        mark = "*" if row["default"] else " "
        if row["error"]:
            print(f"{mark} {row['name']:{width}}  unreadable: {row['error']}")
            continue
        size, what = f"{row['bytes'] / 1e6:,.0f} MB", ", ".join(row["sizes"])
        if row["control"]:
            what = f"{NET_TITLES[row['control']]} for {row['family']}"
        elif row["family"]:
            what = row["family"]
        print(
            f"{mark} {row['name']:{width}}  {row['precision']}  {size:>10}  {what}  {row['source']}"
        )


def use(args: argparse.Namespace) -> None:
    """Set the default bundle."""
    folder = find_bundle(args.name)
    check_makes_images(Bundle(folder, read_manifest(folder)))
    set_default(folder.name if folder.parent == bundles_folder() else str(args.name))
    print(folder)


def remove(args: argparse.Namespace) -> None:
    """Delete a bundle that was built here, and the plans that were built from it."""
    folder = find_bundle(args.name)
    if folder.parent != bundles_folder():
        raise BundleError(
            f"{folder} is not in {bundles_folder()}; only bundles there are removed",
            hint="run `sdrt list` to see which were built here",
        )
    try:
        manifest = read_manifest(folder)
    except BundleError:  # unreadable, so its plans are unknown
        plans = None
    else:
        plans = plans_folder(Bundle(folder, manifest))
    with locked(folder):
        (folder / MANIFEST).unlink()  # without it, the folder is not a bundle
        shutil.rmtree(folder)
    if plans is not None and plans.is_dir():
        shutil.rmtree(plans, ignore_errors=True)
    if default_name() == folder.name:
        clear_default()
    print(folder)
