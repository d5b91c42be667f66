"""A whole run of pictures as one CUDA graph: every evaluation and the mixing in between.

Knows a loaded UNet's plan, the device and schedules; not samplers. Never run on a GPU yet.
"""

import logging
from collections import OrderedDict
from typing import Any

import numpy as np

from sdrt.errors import BackendError

from .cuda import Graph
from .kernels import Advance
from .protocol import Schedule, checked_feeds
from .trt_engine import Bound, Loaded

log = logging.getLogger(__name__)
MOST_LOOPS = 4


class Loop:
    """Buffers and the graph of one layout of schedules."""

    def __init__(self, loaded: Loaded, advance: Advance, schedule: Schedule) -> None:
        self._loaded, self._advance, self._device = loaded, advance, loaded.device
        arrays = schedule.columns, schedule.rows, schedule.timesteps
        self._addresses = [self._device.allocate(array.nbytes) for array in arrays]
        self._graph: Graph | None = None
        self._arena, self._capturable = 0, True
        self._bounds: dict[int, Bound] = {}

    def run(self, schedule: Schedule, bounds: dict[int, Bound]) -> np.ndarray:
        """The result's latents [B, C, H/8, W/8]; bounds: by rows of a picture."""
        device, self._bounds = self._device, bounds
        arrays = schedule.columns, schedule.rows, schedule.timesteps
        kept = [np.ascontiguousarray(array, np.float32) for array in arrays]
        for address, array in zip(self._addresses, kept, strict=True):
            device.upload(address, array)
        fed = self._feed(schedule)
        if self._graph is None or self._arena != device.arena:
            self._prepare(schedule)
        if self._graph is None:
            self._evaluations(schedule)
        else:
            self._graph.launch()
        pictures, places, *shape = schedule.columns.shape
        latents = np.empty((pictures, *shape), np.float32)
        size = latents[0].nbytes
        for i in range(pictures):
            place = i * places + schedule.state_places[-1]
            device.download(latents[i], self._addresses[0] + place * size)
        device.synchronize()
        del fed, kept  # they were read until now
        return latents

    def _feed(self, schedule: Schedule) -> list[np.ndarray]:
        """What stays the same over the run, into the buffers of every number of rows."""
        fed = []
        for used, bound in self._bounds.items():
            feeds = feeds_of(schedule, used)
            for spec in self._loaded.component.inputs:
                array = np.ascontiguousarray(feeds[spec.name], spec.dtype)
                self._device.upload(bound.addresses[spec.name], array)
                fed.append(array)
        return fed

    def _prepare(self, schedule: Schedule) -> None:
        """Capture the graph; without one, kernels are launched one by one."""
        bounds = list(self._bounds.values())
        while not all([self._loaded.ready(bound) for bound in bounds]):
            continue  # one of them moved the arena under another
        self.close_graph()
        if not self._capturable:
            return
        for bound in bounds:
            self._loaded.enqueue(bound)  # TensorRT prepares what a capture may not
        self._device.synchronize()
        try:
            with self._device.capturing() as graph:
                self._evaluations(schedule)
        except BackendError as error:
            if self._device.broken:
                raise
            log.warning("the loop is launched kernel by kernel, without a CUDA graph: %s", error)
            self._capturable = False
            return
        self._graph, self._arena = graph, self._device.arena

    def _evaluations(self, schedule: Schedule) -> None:
        for k in range(len(schedule.used) + 1):
            if k:
                self._loaded.enqueue(self._bounds[schedule.used[k - 1]])
            self._advance(*self._parameters(schedule, k))

    def _parameters(self, schedule: Schedule, k: int) -> tuple[Any, ...]:
        """Of the kernel after k evaluations."""
        columns, rows, timesteps = self._addresses
        count = len(schedule.used)
        pictures, places, *shape = schedule.columns.shape
        before = self._bounds[schedule.used[k - 1]] if k else None
        after = self._bounds[schedule.used[k]] if k < count else None
        size = int(np.prod(shape))
        return (
            rows + k * schedule.rows[0].nbytes,
            timesteps + min(k, count - 1) * schedule.timesteps[0].nbytes,
            columns,
            before.addresses["output"] if before else 0,
            after.addresses["sample"] if after else 0,
            after.addresses["timestep"] if after else 0,
            pictures,
            places,
            size,
            int(np.prod(after.shapes["sample"][1:])) if after else size,
            schedule.used[k - 1] if before else 1,
            schedule.used[k] if after else 1,
            schedule.per,
            schedule.output_places[k - 1] if before else 0,
            schedule.state_places[k],
        )

    def close_graph(self) -> None:
        if self._graph:
            self._graph.close()
        self._graph = None

    def close(self) -> None:
        self.close_graph()
        for address in self._addresses:
            self._device.free(address)


def feeds_of(schedule: Schedule, used: int) -> dict[str, np.ndarray]:
    """The UNet's inputs at the start, for evaluations of so many rows a picture."""
    pictures, _, channels, *sides = schedule.columns.shape
    sample = np.zeros((pictures, used, channels + schedule.beside.shape[1], *sides), np.float32)
    sample[:, :, channels:] = schedule.beside[:, None]
    told = {
        name: value[:, -used:].reshape(-1, *value.shape[2:])
        for name, value in schedule.told.items()
    }
    timestep = np.zeros(pictures * used, np.float32)
    return {"sample": sample.reshape(-1, *sample.shape[2:]), "timestep": timestep, **told}


class Loops:
    """The loops of one loaded UNet; the least recently used are dropped."""

    def __init__(self, loaded: Loaded, target: str) -> None:
        dtype = {spec.name: spec.dtype for spec in loaded.component.inputs}["sample"]
        self._loaded = loaded
        with loaded.device.use():
            self._advance = Advance(loaded.device, target, dtype)
        self._loops: OrderedDict[tuple[object, ...], Loop] = OrderedDict()

    def run(self, schedule: Schedule) -> np.ndarray:
        """See `Sampler.sampled`."""
        loaded = self._loaded
        with loaded.device.use():
            bounds = {}
            for used in sorted(set(schedule.used)):
                feeds = checked_feeds("unet", loaded.component.inputs, feeds_of(schedule, used))
                bounds[used] = loaded.bound({name: value.shape for name, value in feeds.items()})
            layout = schedule.layout
            if layout not in self._loops:
                self._loops[layout] = Loop(self._loaded, self._advance, schedule)
            self._loops.move_to_end(layout)
            while len(self._loops) > MOST_LOOPS:
                self._loops.popitem(last=False)[1].close()
            return self._loops[layout].run(schedule, bounds)

    def clear(self) -> None:
        """Forget every loop: what one was captured with is going."""
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()
