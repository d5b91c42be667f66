"""`sdrt upscale`: enlarge image files. What enlarges is imported when it runs."""

import argparse
import json
from pathlib import Path

from .arguments import BACKENDS, add_json


def add_upscale(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt upscale`."""
    to.add_argument("image", nargs="+", type=Path, metavar="IMAGE", help="the image files")
    to.add_argument(
        "--upscaler",
        default="Lanczos",
        metavar="NAME|FOLDER",
        help="a bundle of `sdrt build --upscaler`, Lanczos or Nearest (default: Lanczos)",
    )
    to.add_argument(
        "--scale", type=float, default=2.0, metavar="N", help="of a side, 1 to 8 (default: 2)"
    )
    to.add_argument(
        "--output",
        type=Path,
        metavar="FILE|FOLDER",
        help="a file, which is replaced, or a folder (default: next to each image)",
    )
    to.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto")
    add_json(to)


def upscale(args: argparse.Namespace) -> None:
    """Print the path of every image, or JSON."""
    from sdrt.runtime.images import open_image, read_parameters, save_image
    from sdrt.runtime.options import format_number
    from sdrt.upscaler import upscale_images

    images = [open_image(path) for path in args.image]
    texts = [read_parameters(image) for image in images]
    single = args.output and args.output.suffix and not args.output.is_dir()
    if single and len(images) > 1:
        from sdrt.errors import UsageError

        raise UsageError(f"--output {args.output} for {len(images)} images", hint="pass a folder")
    paths = []
    enlarged = upscale_images(images, args.upscaler, args.scale, backend=args.backend)
    for path, text, image in zip(args.image, texts, enlarged, strict=True):
        name = f"{path.stem}-{format_number(args.scale)}x.png"
        target = args.output if single else (args.output or path.parent) / name
        # A1111's names, so that `sdrt run --from` does not take it for the image before.
        added = (
            f"Postprocess upscale by: {format_number(args.scale)}, "
            f"Postprocess upscaler: {args.upscaler}"
        )
        text = f"{text}, {added}" if text else added
        paths.append(save_image(image, target, text, replace=bool(single)))
        if not args.json:
            print(paths[-1])
    if args.json:
        print(json.dumps({"images": [str(path) for path in paths]}))
