"""Arguments of the images that a run starts from."""

import argparse
from pathlib import Path

from .common import number


def add_image_input(to: argparse.ArgumentParser) -> None:
    start = to.add_argument_group("Image input")
    start.add_argument("--image", type=Path, metavar="FILE", help="the image to start from")
    start.add_argument(
        "--mask", dest="mask_image", type=Path, metavar="FILE", help="white areas are repainted"
    )
    start.add_argument(
        "--depth", dest="depth_map", type=Path, metavar="FILE", help="depth map, for depth models"
    )
    start.add_argument(
        "--strength",
        type=number,
        metavar="0..1",
        help="denoising strength (default: 0.8, or 1.0 with --mask)",
    )
    start.add_argument(
        "--aesthetic-score", type=float, metavar="SCORE", help="for refiners (default: 6)"
    )
    start.add_argument(
        "--negative-aesthetic-score",
        type=float,
        metavar="SCORE",
        help="the same, of what to steer away from (default: 2.5)",
    )


def add_refiner(to: argparse.ArgumentParser) -> None:
    refiner = to.add_argument_group("Refiner", "Another model does the last part of the run.")
    refiner.add_argument(
        "--refiner", metavar="NAME", help="a refiner's bundle, for a base such as SDXL"
    )
    refiner.add_argument(
        "--refiner-switch",
        dest="refiner_switch_at",
        type=float,
        metavar="0..1",
        help="the part of the run before it (default: 0.8, with --refiner)",
    )


def add_control(to: argparse.ArgumentParser) -> None:
    control = to.add_argument_group("Control")
    control.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NET=FILE[:SCALE[:START:END]]",
        help="steer by an image with a ControlNet or T2I-Adapter, repeatable: a bundle of `sdrt "
        "build --controlnet`, its image, the strength of its control (default: 1), and the part "
        "of the run it is used in (default: 0:1)",
    )
    control.add_argument(
        "--ip-adapter",
        metavar="NAME=FILE[:SCALE]",
        help="an image as a prompt: a bundle of `sdrt build --ip-adapter`, the image, and the "
        "strength of its part (default: 1)",
    )
    control.add_argument(
        "--guess-mode",
        action="store_true",
        default=None,
        help="let ControlNets steer the prompt's side of guidance only",
    )
