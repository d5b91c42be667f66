"""Arguments of the commands that look after bundles."""

import argparse
from pathlib import Path

from .common import add_backend, add_bundle, add_json, integer


def add_bench(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt bench`."""
    add_bundle(to)
    to.add_argument("--size", metavar="WxH", help="image size (default: the bundle's first)")
    to.add_argument(
        "--steps", default="20", metavar="N,M", help="of full images, such as 1,4,20 (default: 20)"
    )
    to.add_argument(
        "--rounds", type=integer, default=7, metavar="N", help="measurements of each (default: 7)"
    )
    to.add_argument(
        "--engines", metavar="A,B", help="only engines whose names contain these (default: all)"
    )
    to.add_argument(
        "--parts",
        metavar="A,B",
        help="only these of text, unet, decode, picture (default: all)",
    )
    to.add_argument("--scheduler", metavar="NAME", help="default: the bundle's")
    to.add_argument(
        "--compiled", action="store_true", help="also compile diffusers, which takes minutes"
    )
    to.add_argument(
        "--exact",
        action="store_true",
        help="only in the bundle's precision, as on a processor without bf16",
    )
    to.add_argument("--json", action="store_true", help="print JSON with every measurement")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="write a bar chart")
    to.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="an earlier report; exit code 1 if anything became slower",
    )


def add_verify(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt verify`."""
    add_bundle(to)
    add_backend(to)
    add_json(to)


def add_gc(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt gc`."""
    to.add_argument("--yes", action="store_true", help="delete; without it, files are only listed")
    add_json(to)


def add_inspect(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt inspect`."""
    to.add_argument("--bundle", metavar="NAME|FOLDER", help="only this one (default: all)")
    to.add_argument(
        "--layers",
        action="store_true",
        help="show how TensorRT fuses attention and normalization",
    )
    add_json(to)


def add_name(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt use` and `sdrt remove`."""
    to.add_argument("name", metavar="NAME", help="as `sdrt list` shows it")
