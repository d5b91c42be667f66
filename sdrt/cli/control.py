"""`--control` and `--ip-adapter` of `sdrt run`: their nets, and the options that it stands for.

Knows the form of the argument; what the options mean is decided in `sdrt.runtime`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdrt.bundle import Bundle, open_bundle
from sdrt.errors import UsageError
from sdrt.runtime.controlnet.net import control_net_from_bundle
from sdrt.runtime.controlnet.text import ControlArgument, parse_control_argument
from sdrt.runtime.images import open_image


def open_control_bundles(arguments: Sequence[str]) -> dict[str, Bundle]:
    """The bundles of the nets that are named, each once; raises BundleError or UsageError."""
    nets = dict.fromkeys(parse_control_argument(text).net for text in arguments)
    bundles = {net: open_bundle(net) for net in nets}
    for bundle in bundles.values():
        control_net_from_bundle(bundle)
    return bundles


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


def parse_ip_adapter(text: str) -> ControlArgument:
    """`NAME=FILE[:SCALE]`; raises UsageError for another form."""
    hint = "for example face=portrait.png:0.7"
    try:
        parsed = parse_control_argument(text)
    except UsageError as error:
        raise UsageError(f"--ip-adapter {text!r} is not NAME=FILE[:SCALE]", hint=hint) from error
    if (parsed.start, parsed.end) != (0.0, 1.0):
        raise UsageError(f"--ip-adapter {text!r} has a part of the run", hint=hint)
    return parsed


def ip_adapter_options(text: str | None) -> dict[str, Any]:
    """The options of an `--ip-adapter` argument; none without."""
    if text is None:
        return {}
    parsed = parse_ip_adapter(text)
    image = open_image(Path(parsed.file))
    return {"ip_adapter_image": [image], "ip_adapter_scale": parsed.scale}
