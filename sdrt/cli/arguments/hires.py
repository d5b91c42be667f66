"""Arguments of a second pass at a higher resolution."""

import argparse

from .common import integer


def add_hires(to: argparse.ArgumentParser) -> None:
    hires = to.add_argument_group(
        "Second pass", "The image is enlarged and goes through the model again (hires fix)."
    )
    hires.add_argument(
        "--hires", dest="hires_scale", type=float, metavar="SCALE", help="enlarge by this, 1 to 8"
    )
    hires.add_argument(
        "--hires-size",
        metavar="WxH",
        help="instead, to this size, cropping what is too much; a side of 0 follows from the other",
    )
    hires.add_argument(
        "--hires-steps", type=integer, metavar="N", help="steps that it runs (default: --steps)"
    )
    hires.add_argument(
        "--hires-strength",
        type=float,
        metavar="0..1",
        help="how far it changes the image (default: 0.7)",
    )
    hires.add_argument(
        "--hires-upscaler",
        metavar="NAME",
        help='Latent, "Latent (nearest-exact)" and its other variants; Lanczos, Nearest or an '
        "upscaler's bundle (default: Latent)",
    )
    hires.add_argument(
        "--hires-scheduler", metavar="NAME", help="its scheduler (default: the first pass's)"
    )
    hires.add_argument(
        "--hires-prompt", metavar="TEXT", help="its prompt (default: the first pass's)"
    )
    hires.add_argument("--hires-negative-prompt", metavar="TEXT", help="the same")
    hires.add_argument("--hires-guidance-scale", type=float, metavar="G", help="the same")
