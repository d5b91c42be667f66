"""`--control` of `sdrt run`: its nets, and the options that it stands for.

Knows the form of the argument; what the options mean is decided in `sdrt.runtime`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdrt.bundle import Bundle, open_bundle
from sdrt.runtime.controlnet.text import parse_control_argument
from sdrt.runtime.images import open_image


def open_control_bundles(arguments: Sequence[str]) -> dict[str, Bundle]:
    """The bundles of the nets that are named, each once; raises BundleError or UsageError."""
    nets = dict.fromkeys(parse_control_argument(text).net for text in arguments)
    return {net: open_bundle(net) for net in nets}


def control_options(arguments: Sequence[str], bundles: Mapping[str, Bundle]) -> dict[str, Any]:
    """The options of `--control` arguments; none without."""
    if not arguments:
        return {}
    parsed = [parse_control_argument(text) for text in arguments]
    return {
        "controlnet": [bundles[one.net].manifest.name for one in parsed],
        "control_image": [open_image(Path(one.file)) for one in parsed],
        "controlnet_conditioning_scale": [one.scale for one in parsed],
        "control_guidance_start": [one.start for one in parsed],
        "control_guidance_end": [one.end for one in parsed],
    }
