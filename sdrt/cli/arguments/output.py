"""Arguments of what is written."""

import argparse
from pathlib import Path

from .common import integer


def add_output(to: argparse.ArgumentParser) -> None:
    output = to.add_argument_group("Output")
    output.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(),
        metavar="FILE|FOLDER",
        help="a .png, .jpg or .webp file, which is replaced, or a folder, where no file is "
        "(default: the current folder)",
    )
    output.add_argument(
        "-n",
        "--num-images",
        dest="num_images_per_prompt",
        type=integer,
        default=1,
        metavar="N",
        help="per prompt (default: 1)",
    )
    output.add_argument(
        "--grid", action="store_true", help="write one image of all; its text has every seed"
    )
    output.add_argument("--preview", action="store_true", help="show the image as it forms")
    output.add_argument("--json", action="store_true", help="print paths, seeds and times as JSON")
