"""Pictures in a terminal. Knows the escape sequences of those that show any."""

import base64
import os
import sys
from collections.abc import Callable


def terminal_graphics() -> Callable[[bytes], str] | None:
    """How this terminal is told to show a PNG, if it can."""
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
