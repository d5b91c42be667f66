"""What a terminal shows: colours, and images where it can. Knows escape sequences."""

import base64
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TextIO

from sdrt.errors import SdrtError


def terminal_graphics() -> Callable[[bytes], str] | None:
    """The escape sequence that shows a PNG in this terminal; None if it cannot show images."""
    if not sys.stderr.isatty():
        return None
    if os.environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return _iterm
    if "kitty" in os.environ.get("TERM", "") or "ghostty" in os.environ.get("TERM", ""):
        return _kitty
    return None


def _iterm(png: bytes) -> str:
    return f"\x1b]1337;File=inline=1;size={len(png)}:{base64.b64encode(png).decode()}\a"


def _kitty(png: bytes) -> str:
    """Chunks of at most 4096 letters, all but the last marked as followed by more."""
    text = base64.b64encode(png).decode()
    parts = [text[i : i + 4096] for i in range(0, len(text), 4096)]
    heads = ["a=T,f=100,i=1,q=2,", *[""] * (len(parts) - 1)]
    more = [*[1] * (len(parts) - 1), 0]
    return "".join(
        f"\x1b_G{head}m={flag};{part}\x1b\\"
        for head, flag, part in zip(heads, more, parts, strict=True)
    )


def use_colour(stream: TextIO) -> bool:
    """Whether to colour what is written there; see https://no-color.org."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def report_error(error: SdrtError) -> None:
    """Print `error: ...` and `hint: ...` to standard error."""
    for label, colour, text in (("error", 31, error.message), ("hint", 36, error.hint)):
        if text:
            print(f"{_label(label, colour)} {text}", file=sys.stderr)


def print_line(line: str, stream: TextIO) -> None:
    """Print a line above the progress bar, if there is one."""
    bars = sys.modules.get("tqdm")
    with bars.tqdm.external_write_mode(file=stream) if bars else nullcontext():
        print(line, file=stream, flush=True)


class LogHandler(logging.Handler):
    """Writes log lines to standard error, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print_line(self.format(record), sys.stderr)


class LogFormatter(logging.Formatter):
    """Messages as they are, warnings and errors with a label."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        label = "warning" if record.levelno == logging.WARNING else "error"
        return f"{_label(label, 33)} {text}"


def _label(text: str, colour: int) -> str:
    return f"\x1b[1;{colour}m{text}:\x1b[0m" if use_colour(sys.stderr) else f"{text}:"
