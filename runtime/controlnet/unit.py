"""The control units of a call: which net reads which image, how strongly, and in which part of
the run. Names and rules are diffusers'.

Knows options and nets; not engines.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL.Image import Image

from sdrt.errors import UsageError
from sdrt.runtime.options import DEFAULTS, GenerationOptions

from .net import CONTROLNET, KINDS, T2I_ADAPTER, ControlNet

T = TypeVar("T")
log = logging.getLogger(__name__)
# Options that shape control, and mean nothing without a control image.
CONTROLNET_OPTIONS = (
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "guess_mode",
)
ADAPTER_OPTIONS = ("adapter_conditioning_scale", "adapter_conditioning_factor")


@dataclass(frozen=True, slots=True)
class ControlUnit:
    """One net's part in a call.

    Attributes:
        net: The net.
        image: Of any size and mode.
        scale: Of its residuals.
        start: The part of the run at which it begins, 0 to 1.
        end: The part of the run at which it stops.
        guess_mode: Whether the negative row gets no residuals, and the others get less of the
            layers near the image.
    """

    net: ControlNet
    image: Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False

    @property
    def cost(self) -> float:
        """Of an evaluation, relative to the UNet's; a T2I-Adapter runs once an image."""
        if self.net.kind == T2I_ADAPTER:
            return 0.0
        return self.net.cost / 2.0 if self.guess_mode else self.net.cost

    def evaluation_scales(self, num_evaluations: int) -> np.ndarray:
        """[N] float64, its scale in every evaluation; 0 outside its part of the run.

        diffusers counts the timesteps that its scheduler has, so a step of two evaluations counts
        twice there too.
        """
        is_inside = [
            1.0 - float(i / num_evaluations < self.start or (i + 1) / num_evaluations > self.end)
            for i in range(num_evaluations)
        ]
        return self.scale * np.asarray(is_inside)


def mean_cost(units: Sequence[ControlUnit], num_evaluations: int) -> float:
    """Of a run's control, relative to the UNet, on average over its evaluations."""
    return sum(
        unit.cost * float(np.mean(unit.evaluation_scales(num_evaluations) != 0.0)) for unit in units
    )


def build_control_units(
    options: GenerationOptions, nets: Mapping[str, ControlNet]
) -> tuple[ControlUnit, ...]:
    """The units of a call; none without a control image.

    Args:
        options: Of the call.
        nets: Those that are loaded, by name.

    Raises:
        UsageError: For options that do not fit the nets or each other.
    """
    images = options.control_image
    if images is None:
        _refuse_without_image(options)
        return ()
    chosen = _choose_nets(options.controlnet, nets)
    if len(images) != len(chosen):
        names = ", ".join(net.name for net in chosen)
        raise UsageError(
            f"{len(images)} control images for {len(chosen)} nets ({names})",
            hint="pass one for each in control_image, or name the nets of this call in controlnet",
        )
    units = _with_options(
        options, [ControlUnit(net, image) for net, image in zip(chosen, images, strict=True)]
    )
    for unit in units:
        if unit.start >= unit.end:
            raise UsageError(
                f"control_guidance_start {unit.start:g} of {unit.net.name} is not below "
                f"control_guidance_end {unit.end:g}",
                hint="pass two numbers from 0 to 1 in ascending order",
            )
    return units


def _refuse_without_image(options: GenerationOptions) -> None:
    for name in ("controlnet", *CONTROLNET_OPTIONS, *ADAPTER_OPTIONS):
        if getattr(options, name) != DEFAULTS[name]:
            raise UsageError(f"{name} requires control_image", hint="pass an image for each net")


def _choose_nets(names: Sequence[str] | None, nets: Mapping[str, ControlNet]) -> list[ControlNet]:
    """The nets of a call; all by default."""
    if not nets:
        raise UsageError(
            "control_image on a pipeline without a ControlNet",
            hint='load one with sdrt.load(..., controlnet="NAME")',
        )
    for name in names or ():
        if name not in nets:
            raise UsageError(f"unknown controlnet {name!r}", hint=f"loaded are {', '.join(nets)}")
    return [nets[name] for name in names or nets]


def _with_options(
    options: GenerationOptions, units: Sequence[ControlUnit]
) -> tuple[ControlUnit, ...]:
    """The units with a call's scales, parts of the run and guess mode."""
    count = len(units)
    scales = _spread("controlnet_conditioning_scale", options.controlnet_conditioning_scale, count)
    starts = _spread("control_guidance_start", options.control_guidance_start, count)
    stops = _spread("control_guidance_end", options.control_guidance_end, count)
    nets = [unit for unit in units if unit.net.kind == CONTROLNET]
    if options.guess_mode and not nets:
        raise UsageError("guess_mode requires a ControlNet", hint="leave it out")
    # A net that pools its residuals guesses too: diffusers asks the first one.
    guesses = bool(nets) and (options.guess_mode or nets[0].net.pools)
    numbered = [
        replace(unit, scale=scale, start=start, end=end, guess_mode=guesses)
        for unit, scale, start, end in zip(units, scales, starts, stops, strict=True)
    ]
    return _with_adapter_options(options, numbered)


def _with_adapter_options(
    options: GenerationOptions, units: Sequence[ControlUnit]
) -> tuple[ControlUnit, ...]:
    """The units, T2I-Adapters among them with the scales and stops that are named after them."""
    count = sum(unit.net.kind == T2I_ADAPTER for unit in units)
    for name in ADAPTER_OPTIONS:
        if getattr(options, name) is not None and not count:
            raise UsageError(f"{name} requires a {KINDS[T2I_ADAPTER]}", hint="leave it out")
    own = options.adapter_conditioning_scale
    scales = iter([] if own is None else _spread(ADAPTER_OPTIONS[0], own, count))
    factor = options.adapter_conditioning_factor
    result = []
    for unit in units:
        if unit.net.kind == T2I_ADAPTER:
            scale, end = next(scales, unit.scale), unit.end if factor is None else factor
            unit = replace(unit, scale=scale, end=end, guess_mode=False)
        result.append(unit)
    return tuple(result)


def _spread(name: str, values: float | Sequence[float], count: int) -> Sequence[float]:
    """One value for each net, from one for all or one for each."""
    listed = [values] if isinstance(values, float | int) else list(values)
    if len(listed) == 1:
        return listed * count
    if len(listed) != count:
        raise UsageError(
            f"{len(listed)} values of {name} for {count} nets",
            hint="pass one for all, or one for each",
        )
    return listed
