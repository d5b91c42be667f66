"""Arguments that several commands share."""

import argparse
import re

from sdrt.errors import UsageError

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "openvino", "torch")
DEFAULT_BUNDLE = "default: the one set by `sdrt use`, or the only one"
Arguments = argparse.ArgumentParser | argparse._ArgumentGroup


def integer(text: str) -> int:
    """An integer; raises the error that argparse reports."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def number(text: str) -> float:
    """A number; raises the error that argparse reports."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def memory_size(text: str) -> int:
    """`"8GB"`, `"7.5 GiB"` or `"800MB"` in bytes; raises the error that argparse reports."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GB or 800MB")
    power = "KMGT".index(match[2].upper()) + 1
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def device(text: str) -> int | str:
    """The number of a GPU, or what `sdrt.load` takes instead."""
    return int(text) if text.lstrip("-").isdecimal() else text


def height_and_width(text: str) -> tuple[int, int]:
    """`"1024x768"`, width first -> (768, 1024), as models expect it."""
    across, x, down = text.lower().partition("x")
    if not (x and across.isdigit() and down.isdigit()):
        raise UsageError(f"{text!r} is not two integers", hint="for example 1024x1024")
    return int(down), int(across)


def add_logging(to: argparse.ArgumentParser) -> None:
    """Arguments of every command."""
    to.add_argument("-v", "--verbose", action="store_true", help="log details")
    to.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")


def add_json(to: argparse.ArgumentParser) -> None:
    to.add_argument("--json", action="store_true", help="print JSON")


def add_bundle(to: Arguments) -> None:
    """`--bundle` of commands that read one."""
    to.add_argument("--bundle", metavar="NAME|FOLDER", help=DEFAULT_BUNDLE)


def add_embedding(to: Arguments) -> None:
    """`--embedding` of commands that read prompts."""
    to.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE|NAME[:WORD]",
        help="let prompts use the word of a textual inversion file, repeatable; those in "
        "$SDRT_HOME/embeddings need no option: their names are words",
    )


def add_static_size(to: Arguments) -> None:
    to.add_argument(
        "--static-size",
        metavar="WIDTHxHEIGHT",
        help="compile for guided images of this size with --backend openvino: often faster",
    )


def add_backend(to: Arguments) -> None:
    to.add_argument("--backend", choices=BACKENDS, default="auto", help="default: auto")
    to.add_argument(
        "--device",
        type=device,
        default=0,
        metavar="N|cpu|cuda",
        help="which NVIDIA GPU, or the kind of device (default: 0, of any kind)",
    )
