"""Control of a run: what its nets read, and their scales by evaluation.

Knows units and the engine protocol; not the loop.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image, Resampling

from sdrt.bundle.manifest import CONTROL
from sdrt.engine import Engine, LazyEngine
from sdrt.runtime.images import convert_to_rgb

from .net import CONTROL_IMAGE, CONTROLNET, T2I_ADAPTER
from .unit import ControlUnit

log = logging.getLogger(__name__)
Size = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class NetControl:
    """A ControlNet's part in a run; it is called in every evaluation with a scale.

    Attributes:
        engine_name: Of the net.
        image: [3, H, W] float32 in [0, 1].
        scales: [N] of the evaluations; 0 where the net is not called.
        guess_mode: Whether the negative row gets no residuals, and layers get scales of their own.
        cost: Of a call, relative to one of the UNet with as many rows.
    """

    engine_name: str
    image: np.ndarray
    scales: np.ndarray
    guess_mode: bool
    cost: float = 0.0

    def layer_scales(self, k: int, count: int) -> np.ndarray:
        """[count] float32, of every residual in evaluation k.

        In guess mode they rise from 0.1 at the first to 1 at the last, as diffusers has them.
        """
        weights = np.logspace(-1.0, 0.0, count) if self.guess_mode else np.ones(count)
        return (np.float32(self.scales[k]) * weights.astype(np.float32)).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterControl:
    """A T2I-Adapter's part in a run; its maps do not depend on latents or timestep.

    Attributes:
        states: [C, h, w] float32 by name, unscaled.
        scales: [N] of the evaluations.
    """

    states: Mapping[str, np.ndarray]
    scales: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """All units of a run; shared by the images of a call."""

    nets: tuple[NetControl, ...] = ()
    adapters: tuple[AdapterControl, ...] = ()

    def is_active(self, k: int) -> bool:
        """Whether evaluation k has residuals."""
        nets = any(net.scales[k] != 0.0 for net in self.nets)
        return nets or any(adapter.scales[k] != 0.0 for adapter in self.adapters)

    def cost(self, k: int) -> float:
        """Of the nets in evaluation k, relative to the UNet."""
        return sum(net.cost for net in self.nets if net.scales[k] != 0.0)

    def load_engines(self, engines: Mapping[str, Engine]) -> None:
        """Load the engines that the run needs, except those that take turns in memory."""
        for name in (CONTROL, *(net.engine_name for net in self.nets)):
            engine = engines[name]
            if isinstance(engine, LazyEngine):
                engine.warm_up()


def prepare_control(
    units: Sequence[ControlUnit], engines: Mapping[str, Engine], size: Size, num_evaluations: int
) -> Control | None:
    """Read the control images of a call, and run its T2I-Adapters.

    Args:
        units: Of the call.
        engines: By component; nets by `ControlNet.engine_name`.
        size: (width, height) of the images.
        num_evaluations: Of the run.

    Returns:
        None without units.
    """
    if not units:
        return None
    read = []
    for unit in units:
        scales = unit.evaluation_scales(num_evaluations)
        read.append((unit, control_image_to_array(unit.image, size), scales))
        if unit.scale and not scales.any():
            log.warning(
                "%s has no effect: none of the %d evaluations lies from %g to %g of the run",
                *(unit.net.name, num_evaluations, unit.start, unit.end),
            )
    return Control(
        tuple(
            NetControl(unit.net.engine_name, image, scales, unit.guess_mode, unit.cost)
            for unit, image, scales in read
            if unit.net.kind == CONTROLNET
        ),
        tuple(
            AdapterControl(_run_adapter(engines[unit.net.engine_name], image), scales)
            for unit, image, scales in read
            if unit.net.kind == T2I_ADAPTER
        ),
    )


def _run_adapter(engine: Engine, image: np.ndarray) -> dict[str, np.ndarray]:
    """Its maps by name, [C, h, w]."""
    outputs = engine({CONTROL_IMAGE: image[None]})
    return {name: value[0].astype(np.float32) for name, value in outputs.items()}


def control_image_to_array(image: Image, size: Size) -> np.ndarray:
    """A control image as nets read it: upright, RGB, resized (Lanczos) as diffusers does.

    Args:
        image: In any mode.
        size: (width, height).

    Returns:
        [3, H, W] float32 in [0, 1].
    """
    colour = convert_to_rgb(image)
    if colour.size != size:
        log.info("Control image: resized from %dx%d to %dx%d", *colour.size, *size)
    pixels = np.asarray(colour.resize(size, Resampling.LANCZOS), np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(255.0)
