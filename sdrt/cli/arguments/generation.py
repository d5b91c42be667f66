"""The arguments of `sdrt run` and `sdrt compare`, from the groups."""

import argparse
from pathlib import Path

from .hires import add_hires
from .image_input import add_control, add_image_input, add_refiner
from .model import add_model
from .output import add_output
from .prompt import add_prompt
from .sampling import add_guidance, add_guidance_scale, add_sampling, add_seed_and_size


def add_run(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt run`."""
    to.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="what to show; (word:1.3) and [word] weight words. Omit it for unconditional models",
    )
    to.add_argument(
        "--from",
        type=Path,
        metavar="FILE",
        dest="source",
        help="generate an image again from the settings in its file; other arguments override "
        "them. Identical pixels need the same bundle, backend and machine",
    )
    add_output(to)
    add_sampling(to)
    add_guidance(to)
    add_image_input(to)
    add_hires(to)
    add_control(to)
    add_refiner(to)
    add_prompt(to)
    add_model(to)


def add_compare(to: argparse.ArgumentParser) -> None:
    """Arguments of `sdrt compare`."""
    to.add_argument("prompt", metavar="PROMPT", help="the prompt of every image")
    to.add_argument("--schedulers", metavar="A,B", help="see `sdrt schedulers` (default: all)")
    to.add_argument("--steps", default="20", metavar="N,M", help="such as 5,10,20 (default: 20)")
    output = to.add_argument_group("Output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path("compare.png"),
        metavar="FILE",
        help="default: compare.png",
    )
    output.add_argument("--json", action="store_true", help="print paths and times as JSON")
    sampling = to.add_argument_group("Sampling")
    add_seed_and_size(sampling)
    add_guidance_scale(sampling)
    add_model(to)
