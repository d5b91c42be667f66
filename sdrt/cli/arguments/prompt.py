"""Arguments of the text and of what else SDXL is conditioned on."""

import argparse

from .common import height_and_width, integer


def add_prompt(to: argparse.ArgumentParser) -> None:
    text = to.add_argument_group("Prompt")
    text.add_argument(
        "--clip-skip",
        type=integer,
        default=0,
        metavar="N",
        help="last layers of the text encoder to skip (default: 0)",
    )
    text.add_argument(
        "--literal",
        dest="weighting",
        action="store_false",
        help="disable prompt weighting; treat brackets literally",
    )
    text.add_argument(
        "--cut",
        dest="long_prompts",
        action="store_const",
        const="cut",
        default="chunk",
        help="truncate prompts longer than 75 tokens",
    )
    sizes = to.add_argument_group("SDXL size conditioning")
    sizes.add_argument(
        "--original-size", type=height_and_width, metavar="WxH", help="default: the image size"
    )
    sizes.add_argument(
        "--crop",
        dest="crops_coords_top_left",
        type=height_and_width,
        metavar="LEFTxTOP",
        help="default: 0x0",
    )
    sizes.add_argument(
        "--target-size", type=height_and_width, metavar="WxH", help="default: the image size"
    )
