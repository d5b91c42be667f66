"""Control units as text: an argument of the command line, and a setting in an image's file.

Knows both forms; not nets or images.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sdrt.errors import UsageError
from sdrt.runtime.options import format_number

from .unit import ControlUnit

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
# A file's name may have colons, so the numbers are what is left of it at the end.
ARGUMENT = re.compile(
    rf"(?P<net>[^=]+)=(?P<file>.+?)(?::(?P<scale>{NUMBER})(?::(?P<start>{NUMBER}):(?P<end>{NUMBER}))?)?"
)
FORM = "NET=FILE[:SCALE[:START:END]]"
SETTING = re.compile(r"ControlNet (\d+)")  # its name, as sd-webui-controlnet writes it


@dataclass(frozen=True, slots=True)
class ControlArgument:
    """`NET=FILE[:SCALE[:START:END]]`: a net's name or folder, its image and its numbers."""

    net: str
    file: str
    scale: float
    start: float
    end: float


def parse_control_argument(text: str) -> ControlArgument:
    """Raises UsageError for another form."""
    match = ARGUMENT.fullmatch(text)
    if not match:
        raise UsageError(
            f"--control {text!r} is not {FORM}", hint="for example canny=edges.png:0.8"
        )
    numbers = [float(match[name] or default) for name, default in _DEFAULTS.items()]
    return ControlArgument(match["net"], match["file"], *numbers)


_DEFAULTS = {"scale": 1.0, "start": 0.0, "end": 1.0}


def describe_units(units: Sequence[ControlUnit]) -> dict[str, str]:
    """The settings of a call's units, by name, in sd-webui-controlnet's words where it has them."""
    return {f"ControlNet {i}": _describe_unit(unit) for i, unit in enumerate(units)}


def _describe_unit(unit: ControlUnit) -> str:
    values = {
        "Module": "none",
        "Model": unit.net.name,
        "Weight": format_number(unit.scale),
        "Resize Mode": "Just Resize",
        "Guidance Start": format_number(unit.start),
        "Guidance End": format_number(unit.end),
        "Guess Mode": unit.guess_mode,
    }
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def parse_setting(text: str) -> dict[str, str]:
    """The values of a unit's setting by name."""
    values = re.findall(r"([\w ]+): ([^,]*)", text)
    return {name.strip(): value.strip() for name, value in values}


def argument_from_setting(text: str) -> str:
    """What to type for a unit of an image's file, with FILE for its image.

    Raises:
        UsageError: For what would give another image.
    """
    named = parse_setting(text)
    if (mode := named.get("Control Mode", "Balanced")) != "Balanced":
        raise UsageError(
            f"Control Mode {mode!r} is unsupported", hint="only Balanced is the same image here"
        )
    net, scale = named.get("Model", "NET"), named.get("Weight", "1")
    start, end = named.get("Guidance Start", "0"), named.get("Guidance End", "1")
    return f"--control {net}=FILE:{scale}:{start}:{end}"
