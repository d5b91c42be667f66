"""Whole pictures as one CUDA graph: text encoder, every evaluation with the mixing in between,
decoder, and the copies from and to pinned memory.

Knows loaded plans, the device and schedules; not samplers. Never run on a GPU yet.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.engine.cuda.driver import Graph, Mirrored
from sdrt.engine.cuda.kernels import Kernels
from sdrt.engine.protocol import check_feeds
from sdrt.engine.sampling import SamplingProgram, SamplingResult, TextInput
from sdrt.errors import BackendError

from .loaded_plan import Bound, Loaded

log = logging.getLogger(__name__)
MAX_LOOPS = 4


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a loop runs, and how each is put into the stream: the UNet by rows of a picture, and
    the text encoder and the decoder of one picture where they take part.
    """

    unet: dict[int, Bound]
    encoder: Bound | None
    decoder: Bound | None

    @property
    def all(self) -> list[Bound]:
        return [bound for bound in (*self.unet.values(), self.encoder, self.decoder) if bound]


class Loop:
    """Buffers and the graph of one layout of schedules."""

    def __init__(
        self,
        parts: "Parts",
        kernels: Mapping[str, Kernels],
        schedule: SamplingProgram,
        some: Bounds,
    ) -> None:
        """kernels: by dtype; the decoder may be in another than the UNet"""
        self._parts, self._device = parts, parts.unet.device
        self._kernels = kernels[dtype_of(parts.unet, "sample")]
        self._ends = kernels[dtype_of(parts.decoder, "image")] if parts.decoder else self._kernels
        self._graph: Graph | None = None
        self._arena, self._capturable = 0, True
        self._bounds = some
        self._held: dict[str, Mirrored] = {}
        try:
            for name, (shape, dtype) in self._buffers(schedule).items():
                self._held[name] = Mirrored(self._device, shape, dtype)
        except BackendError:
            self.close()
            raise

    def _buffers(self, schedule: SamplingProgram) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of what belongs to this loop alone."""
        pictures, _, *shape = schedule.columns.shape
        buffers = {
            name: (getattr(schedule, name).shape, "float32")
            for name in ("columns", "rows", "timesteps")
        }
        buffers["latents"] = (pictures, *shape), "float32"
        if schedule.read and self._bounds.encoder:
            ids = schedule.read.ids.shape
            buffers |= {"weights": (ids, "float32"), "places": (ids[:-1], "int32")}
            buffers["sums"] = self._bounds.encoder.tensors["input_ids"].array.shape, "float32"
        if self._bounds.decoder:
            _, colours, *sides = self._bounds.decoder.tensors["image"].array.shape
            buffers["pixels"] = (pictures, *sides, colours), "uint8"
            buffers["bad"] = (pictures,), "int32"
        return buffers

    def run(self, schedule: SamplingProgram, bounds: Bounds) -> SamplingResult:
        """See `ProgramEngine.run_program`; bounds: of this schedule's shapes."""
        moved = [a is not b for a, b in zip(bounds.all, self._bounds.all, strict=True)]
        self._bounds = bounds
        self._fill(schedule)
        if self._graph is None or self._arena != self._device.arena or any(moved):
            self._prepare(schedule)
        if self._graph is None:
            self._everything(schedule)
        else:
            self._graph.launch()
        self._device.synchronize()
        latents, pixels = self._held["latents"].array.copy(), self._held.get("pixels")
        if pixels is None:
            return SamplingResult(latents)
        return SamplingResult(
            latents, pixels.array.copy(), [not bad for bad in self._held["bad"].array]
        )

    def _fill(self, schedule: SamplingProgram) -> None:
        """What this run is told, into pinned memory."""
        for name in ("columns", "rows", "timesteps"):
            self._held[name].array[...] = getattr(schedule, name)
        if schedule.read and self._bounds.encoder:
            ids, places = different(schedule.read)
            self._bounds.encoder.tensors["input_ids"].array[...] = ids
            self._held["places"].array[...] = places
            self._held["weights"].array[...] = schedule.read.weights
        for used, bound in self._bounds.unet.items():
            for name, value in feeds_of(schedule, used).items():
                bound.tensors[name].array[...] = value

    def _prepare(self, schedule: SamplingProgram) -> None:
        """Capture the graph; without one, kernels are launched one by one."""
        while not all([loaded.ready(bound) for loaded, bound in self._parts.of(self._bounds)]):
            continue  # one of them moved the arena under another
        self.close_graph()
        self._arena = self._device.arena
        if not self._capturable:
            return
        self._upload(schedule)  # an encoder must not see ids that are none
        for loaded, bound in self._parts.of(self._bounds):
            loaded.enqueue(bound)  # TensorRT prepares what a capture may not
        self._device.synchronize()
        try:
            with self._device.capturing() as graph:
                self._everything(schedule)
        except BackendError as error:
            if self._device.broken:
                raise
            log.warning("the loop is launched kernel by kernel, without a CUDA graph: %s", error)
            self._capturable = False
            return
        self._graph = graph

    def _everything(self, schedule: SamplingProgram) -> None:
        """The whole run, put into the stream."""
        self._upload(schedule)
        if schedule.read:
            self._read(schedule.read)
        self._evaluations(schedule)
        self._results(schedule)

    def _upload(self, schedule: SamplingProgram) -> None:
        """What this run is told, to the GPU."""
        for name in ("columns", "rows", "timesteps", "places", "weights"):
            if name in self._held:
                self._held[name].upload()
        if self._bounds.encoder:
            self._bounds.encoder.tensors["input_ids"].upload()
        for used, bound in self._bounds.unet.items():
            for name in feeds_of(schedule, used):
                bound.tensors[name].upload()

    def _read(self, read: TextInput) -> None:
        """The text through its encoder, into every context that the UNet is fed."""
        encoder, held = self._bounds.encoder, self._held
        assert encoder is not None and self._parts.encoder is not None
        self._parts.encoder.enqueue(encoder)
        made, sums = encoder.tensors["contexts"], held["sums"].address
        stretches, layers, tokens, width = made.array.shape
        numbers = layers, layers - 1 - read.skip, tokens, width
        self._kernels("sum_tokens", stretches * tokens, made.address, sums, stretches, *numbers)
        pictures, rows, each, _ = read.ids.shape
        for used, bound in self._bounds.unet.items():
            context = bound.tensors["context"]
            self._kernels(
                "write_context",
                context.array.size,
                *(made.address, sums, held["places"].address, held["weights"].address),
                *(context.address, pictures, rows, used, each, *numbers),
            )

    def _evaluations(self, schedule: SamplingProgram) -> None:
        pictures, _, *shape = schedule.columns.shape
        for k in range(len(schedule.used) + 1):
            if k:
                self._parts.unet.enqueue(self._bounds.unet[schedule.used[k - 1]])
            values = self._parameters(schedule, k)
            self._kernels("advance_pictures", pictures * int(np.prod(shape)), *values)

    def _parameters(self, schedule: SamplingProgram, k: int) -> tuple[Any, ...]:
        """Of the kernel after k evaluations."""
        columns, rows, timesteps = (
            self._held[name].address for name in ("columns", "rows", "timesteps")
        )
        count = len(schedule.used)
        pictures, places, *shape = schedule.columns.shape
        before = self._bounds.unet[schedule.used[k - 1]].tensors if k else {}
        after = self._bounds.unet[schedule.used[k]].tensors if k < count else {}
        size = int(np.prod(shape))
        return (
            rows + k * self._held["rows"].array[0].nbytes,
            timesteps + min(k, count - 1) * self._held["timesteps"].array[0].nbytes,
            columns,
            before["output"].address if before else 0,
            after["sample"].address if after else 0,
            after["timestep"].address if after else 0,
            pictures,
            places,
            size,
            after["sample"].array[0].size if after else size,
            schedule.used[k - 1] if before else 1,
            schedule.used[k] if after else 1,
            schedule.per,
            schedule.output_places[k - 1] if before else 0,
            schedule.state_places[k],
        )

    def _results(self, schedule: SamplingProgram) -> None:
        """Every picture's latents, and its pixels where there is a decoder, to the host."""
        held, decoder, loaded = self._held, self._bounds.decoder, self._parts.decoder
        pictures, places = schedule.columns.shape[:2]
        latents = held["latents"].array
        for i in range(pictures):
            place = i * places + schedule.state_places[-1]
            result = held["columns"].address + place * latents[i].nbytes
            self._device.download(latents[i], result)
            if decoder is None or loaded is None:
                continue
            size, pixels = latents[i].size, held["pixels"]
            bad = held["bad"].address + 4 * i
            fed, made = decoder.tensors["latents"].address, decoder.tensors["image"].address
            self._ends("write_latents", size, result, fed, bad, size)
            loaded.enqueue(decoder)
            each = pixels.array[i].size // 3
            to = pixels.address + i * pixels.array[i].nbytes
            self._ends("write_pixels", each, made, to, bad, each)
        for name in ("pixels", "bad"):
            if name in held:
                held[name].download()

    def close_graph(self) -> None:
        if self._graph:
            self._graph.close()
        self._graph = None

    def close(self) -> None:
        self.close_graph()
        for held in self._held.values():
            held.close()
        self._held.clear()


def feeds_of(schedule: SamplingProgram, used: int) -> dict[str, np.ndarray]:
    """The UNet's inputs at the start, for evaluations of so many rows a picture, but a context that
    is read in the run.
    """
    pictures, _, channels, *sides = schedule.columns.shape
    sample = np.zeros((pictures, used, channels + schedule.beside.shape[1], *sides), np.float32)
    sample[:, :, channels:] = schedule.beside[:, None]
    told = {
        name: value[:, -used:].reshape(-1, *value.shape[2:])
        for name, value in schedule.told.items()
    }
    timestep = np.zeros(pictures * used, np.float32)
    return {"sample": sample.reshape(-1, *sample.shape[2:]), "timestep": timestep, **told}


def different(read: TextInput) -> tuple[np.ndarray, np.ndarray]:
    """The different stretches [R, tokens] int32, and which of them each is [B, rows, stretches]."""
    *shape, tokens = read.ids.shape
    ids, places = np.unique(read.ids.reshape(-1, tokens), axis=0, return_inverse=True)
    return ids.astype(np.int32), places.reshape(shape).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Parts:
    """The loaded plans of a run."""

    unet: Loaded
    encoder: Loaded | None
    decoder: Loaded | None

    def of(self, bounds: Bounds) -> list[tuple[Loaded, Bound]]:
        pairs = [(self.encoder, bounds.encoder), (self.decoder, bounds.decoder)]
        other = [(loaded, bound) for loaded, bound in pairs if loaded and bound]
        return [*((self.unet, bound) for bound in bounds.unet.values()), *other]

    def bounds(self, schedule: SamplingProgram) -> Bounds:
        """What runs a schedule's shapes; raises BackendError where a plan has no profile for them,
        UsageError for what misfits.
        """
        encoder = decoder = None
        unet = {used: self._unet_bound(schedule, used) for used in sorted(set(schedule.used))}
        if schedule.read and self.encoder:
            encoder = self.encoder.bound({"input_ids": different(schedule.read)[0].shape})
        if self.decoder:
            decoder = self.decoder.bound({"latents": (1, *schedule.columns.shape[2:])})
        return Bounds(unet, encoder, decoder)

    def _unet_bound(self, schedule: SamplingProgram, used: int) -> Bound:
        inputs, feeds = self.unet.component.inputs, feeds_of(schedule, used)
        if schedule.read:
            width = {spec.name: spec.shape for spec in inputs}["context"][-1]
            pictures, _, stretches, tokens = schedule.read.ids.shape
            feeds["context"] = np.zeros((pictures * used, stretches * tokens, int(width)), np.int8)
        feeds = check_feeds("unet", inputs, feeds)
        return self.unet.bound({name: value.shape for name, value in feeds.items()})


class Loops:
    """The loops of one loaded UNet; the least recently used are dropped."""

    def __init__(self, loaded: Loaded, target: str) -> None:
        self._loaded, self._target = loaded, target
        self._kernels: dict[str, Kernels] = {}
        self._loops: OrderedDict[tuple[object, ...], Loop] = OrderedDict()

    def run(
        self, schedule: SamplingProgram, encoder: Loaded | None, decoder: Loaded | None
    ) -> SamplingResult:
        """See `ProgramEngine.run_program`; the device is in use."""
        parts = Parts(self._loaded, encoder, decoder)
        for loaded, name in ((self._loaded, "sample"), (decoder, "image")):
            if loaded and (dtype := dtype_of(loaded, name)) not in self._kernels:
                self._kernels[dtype] = Kernels(loaded.device, self._target, dtype)
        bounds = parts.bounds(schedule)
        rows = bounds.encoder.tensors["input_ids"].array.shape if bounds.encoder else None
        layout = (schedule.layout, rows, encoder, decoder)
        if layout not in self._loops:
            self._loops[layout] = Loop(parts, self._kernels, schedule, bounds)
        self._loops.move_to_end(layout)
        while len(self._loops) > MAX_LOOPS:
            self._loops.popitem(last=False)[1].close()
        return self._loops[layout].run(schedule, bounds)

    def close(self) -> None:
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()


def dtype_of(loaded: Loaded, name: str) -> str:
    """Of one of a plan's tensors."""
    specs = (*loaded.component.inputs, *loaded.component.outputs)
    return {spec.name: spec.dtype for spec in specs}[name]
