"""The residual inputs of one call of the model: each net runs once, over the rows that need it.

Knows engines, rows of a batch and `Control`; not samplers or guidance.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.bundle.manifest import (
    ADAPTER_STATE,
    DOWN_RESIDUAL,
    IP_ADAPTER_KV,
    IP_ADAPTER_SCALE,
    MID_RESIDUAL,
)
from sdrt.engine import Engine, Feeds
from sdrt.engine.axes import spec_shape

from .control import Control, NetControl
from .net import CONTROL_IMAGE

RESIDUALS = (DOWN_RESIDUAL, MID_RESIDUAL, ADAPTER_STATE)


@dataclass(frozen=True, slots=True)
class ControlledRows:
    """An image's rows in a call of the model.

    Attributes:
        control: Of the image; None without.
        evaluation: Its place in the image's run.
        first: The image's first row.
        count: Its rows.
        num_negative: How many of them are negative; they are the first.
    """

    control: Control | None
    evaluation: int
    first: int
    count: int
    num_negative: int

    @property
    def is_active(self) -> bool:
        return self.control is not None and self.control.is_active(self.evaluation)

    def active_nets(self) -> Iterator[tuple[NetControl, slice]]:
        """ControlNets that run in this evaluation, with the rows that they run on."""
        for unit in self.control.nets if self.control else ():
            if unit.scales[self.evaluation] != 0.0:
                skipped = self.num_negative if unit.guess_mode else 0
                yield unit, slice(self.first + skipped, self.first + self.count)


class ResidualBatch:
    """The residual inputs of a batch. Rows without control are zeros, which change nothing."""

    def __init__(self, unet: Engine, feeds: Feeds, min_rows: int = 0) -> None:
        """Allocate zeros.

        Args:
            unet: That reads residuals.
            feeds: Its other inputs, of the batch's shapes.
            min_rows: Calls of nets with fewer rows are padded with zeros.
        """
        rows, _, height, width = feeds["sample"].shape
        lengths = {"rows": rows, "latent_height": height, "latent_width": width}
        self._min_rows = min_rows
        self._buffers = {
            spec.name: np.zeros(spec_shape(spec, lengths), spec.dtype)
            for spec in unet.inputs
            if spec.name.startswith(RESIDUALS)
        }
        self._unused = {  # an IP-Adapter's, which are zeros in a batch without image prompts
            spec.name: np.zeros(spec_shape(spec, {"rows": rows, "image_tokens": 1}), spec.dtype)
            for spec in unet.inputs
            if spec.name in (IP_ADAPTER_KV, IP_ADAPTER_SCALE) and spec.name not in feeds
        }
        self._written: set[int] = set()  # images by their first row

    def compute(
        self, engines: Mapping[str, Engine], images: Sequence[ControlledRows], feeds: Feeds
    ) -> Feeds:
        """Run the nets of a call and combine their outputs.

        Args:
            engines: By component; nets by their `engine_name`.
            images: All images of the batch, in their order.
            feeds: Of the UNet without residuals.

        Returns:
            Every residual input by name, [rows, C, h, w]; the next call overwrites them.
        """
        outputs = self._run_nets(engines, images, feeds)
        for image in images:
            if not (image.is_active or image.first in self._written):
                continue
            rows = slice(image.first, image.first + image.count)
            for buffer in self._buffers.values():
                buffer[rows] = 0.0
            self._written.discard(image.first)
            if image.is_active:
                self._written.add(image.first)
                self._write_nets(image, outputs)
                self._write_adapters(image, rows)
        return {**self._buffers, **self._unused}

    def _run_nets(
        self, engines: Mapping[str, Engine], images: Sequence[ControlledRows], feeds: Feeds
    ) -> dict[tuple[int, int], Feeds]:
        """Outputs by the image's first row and the unit's place among its active ones."""
        by_net: dict[str, list[tuple[tuple[int, int], NetControl, slice]]] = {}
        for image in images:
            for place, (unit, rows) in enumerate(image.active_nets()):
                calls = by_net.setdefault(unit.engine_name, [])
                calls.append(((image.first, place), unit, rows))
        outputs: dict[tuple[int, int], Feeds] = {}
        for name, calls in by_net.items():
            result = self._run_net(engines[name], [(unit, rows) for _, unit, rows in calls], feeds)
            at = 0
            for key, _, rows in calls:
                count = rows.stop - rows.start
                outputs[key] = {name: value[at : at + count] for name, value in result.items()}
                at += count
        return outputs

    def _run_net(
        self, engine: Engine, calls: Sequence[tuple[NetControl, slice]], feeds: Feeds
    ) -> dict[str, np.ndarray]:
        """One call of a net over the rows of all images that need it."""
        specs = {spec.name: spec for spec in engine.inputs}
        index = np.concatenate([np.arange(rows.start, rows.stop) for _, rows in calls])
        inputs = {name: feeds[name][index] for name in specs if name != CONTROL_IMAGE}
        # An inpainting model's further channels are not the net's.
        inputs["sample"] = inputs["sample"][:, : int(specs["sample"].shape[1])]
        images = [unit.image for unit, rows in calls for _ in range(rows.start, rows.stop)]
        inputs[CONTROL_IMAGE] = np.stack(images)
        if (missing := self._min_rows - len(index)) > 0:
            inputs = {
                name: np.concatenate([value, np.zeros((missing, *value.shape[1:]), value.dtype)])
                for name, value in inputs.items()
            }
        return engine(inputs)

    def _write_nets(self, image: ControlledRows, outputs: Mapping[tuple[int, int], Feeds]) -> None:
        """Sum an image's residuals, in float32 and in the order of its units."""
        names = [name for name in self._buffers if not name.startswith(ADAPTER_STATE)]
        units = list(image.active_nets())
        if not units:
            return
        scales = [unit.layer_scales(image.evaluation, len(names)) for unit, _ in units]
        for name in names:
            shape = (image.count, *self._buffers[name].shape[1:])
            total = np.zeros(shape, np.float32)
            for place, (_, rows) in enumerate(units):
                residual = outputs[image.first, place][name].astype(np.float32)
                own = slice(rows.start - image.first, rows.stop - image.first)
                total[own] += residual * scales[place][_layer(name)]  # pooled: [rows, C, 1, 1]
            self._buffers[name][image.first : image.first + image.count] = total

    def _write_adapters(self, image: ControlledRows, rows: slice) -> None:
        """Sum an image's maps; every row gets the same."""
        assert image.control is not None
        active = [a for a in image.control.adapters if a.scales[image.evaluation] != 0.0]
        for name in active[0].states if active else ():
            self._buffers[name][rows] = sum(
                adapter.states[name] * np.float32(adapter.scales[image.evaluation])
                for adapter in active
            )


def _layer(name: str) -> int:
    """A residual's place among a ControlNet's; the middle is the last."""
    return -1 if name == MID_RESIDUAL else int(name.rpartition("_")[2])
