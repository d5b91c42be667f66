"""A report as an image: bars of what the UNet and the decoder reach, and the limit as a line.

Knows reports and Pillow.
"""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sdrt.errors import UsageError

WIDTH, BAR, GAP, MARGIN, NAMES = 1000, 22, 8, 24, 250
COLOURS = {"float32": "#4477aa", "bfloat16": "#ee7733"}
OTHER, INK, PAPER = "#999999", "#222222", "#ffffff"


def write_plot(report: dict[str, Any], path: Path) -> None:
    """A PNG; raises UsageError where it cannot be written."""
    try:
        draw_plot(report).save(path)
    except OSError as error:
        raise UsageError(f"--plot {path} cannot be written: {error}") from error


def check_path(path: Path) -> None:
    """Raises UsageError for a file that would not be written, before anything is measured."""
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UsageError(
            f"--plot {path}; expected a name that ends in .png in a folder that is there"
        )


def draw_plot(report: dict[str, Any]) -> Image.Image:
    """A bar for every engine and part, in GFLOP/s, and a line for every dtype's limit."""
    bars = [
        (f"{engine['name']}, {part}", engine["dtype"], figures["flops_per_second"] / 1e9)
        for part in ("unet", "decode")
        for engine in report["engines"]
        if "flops_per_second" in (figures := engine["parts"].get(part, {}))
    ]
    limits = {dtype: limit["flops_per_second"] / 1e9 for dtype, limit in report["limits"].items()}
    top = 3 * MARGIN
    height = top + len(bars) * (BAR + GAP) + 2 * MARGIN
    highest = max([*limits.values(), *(value for _, _, value in bars)])
    scale = (WIDTH - NAMES - 4 * MARGIN) / highest
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    title = (
        f"{report['bundle']} at {report['size']}, GFLOP/s; {report['machine']}, {report['date']}"
    )
    draw.text((MARGIN, MARGIN // 2), title, INK, font)
    for i, (name, dtype, value) in enumerate(bars):
        y, x = top + i * (BAR + GAP), NAMES + value * scale
        draw.text((MARGIN, y + 2), name, INK, font)
        draw.rectangle((NAMES, y, x, y + BAR), COLOURS.get(dtype, OTHER))
        draw.text((x + 6, y + 2), f"{value:.0f}", INK, font)
    for dtype, value in limits.items():
        x, colour = NAMES + value * scale, COLOURS.get(dtype, OTHER)
        draw.line((x, top - GAP, x, height - 2 * MARGIN), colour, 2)
        text = f"limit {dtype} {value:.0f}"
        draw.text((x - draw.textlength(text, font), top - 26), text, colour, font)
    return image
