"""`sdrt preprocess`: control images. What computes them is imported when it runs."""

import argparse
import json
from pathlib import Path

from sdrt.preprocessors import DEFAULT_HIGH_THRESHOLD, DEFAULT_LOW_THRESHOLD, PREPROCESSORS

from .arguments import add_json


def add_preprocess(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt preprocess`."""
    to.add_argument("preprocessor", choices=PREPROCESSORS, help="what to compute")
    to.add_argument("image", type=Path, metavar="IMAGE", help="the image file")
    to.add_argument(
        "--size",
        metavar="WxH",
        help="of the result: that of the images to generate (default: the image's)",
    )
    to.add_argument(
        "--low-threshold",
        type=float,
        default=DEFAULT_LOW_THRESHOLD,
        metavar="N",
        help=f"gradient that continues an edge (default: {DEFAULT_LOW_THRESHOLD})",
    )
    to.add_argument(
        "--high-threshold",
        type=float,
        default=DEFAULT_HIGH_THRESHOLD,
        metavar="N",
        help=f"gradient that begins an edge (default: {DEFAULT_HIGH_THRESHOLD})",
    )
    to.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="a file, which is replaced (default: next to the image, such as photo-canny.png)",
    )
    add_json(to)


def preprocess(args: argparse.Namespace) -> None:
    """Print the path of the control image, or JSON."""
    from sdrt.preprocessors import preprocess as compute
    from sdrt.runtime.images import open_image, save_image

    result = compute(
        args.preprocessor,
        open_image(args.image),
        size=args.size,
        low_threshold=args.low_threshold,
        high_threshold=args.high_threshold,
    )
    default = args.image.with_name(f"{args.image.stem}-{args.preprocessor}.png")
    path = save_image(result, args.output or default, "", replace=args.output is not None)
    print(json.dumps({"images": [str(path)]}) if args.json else path)
