"""Complete sampling programs as one CUDA graph: text encoder, every evaluation with the mixing in
between, decoder, and the copies from and to pinned memory.

Knows loaded plans, the device and programs; not samplers. Not yet run on a GPU.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.engine.cuda.driver import CudaGraph, MirroredBuffer
from sdrt.engine.cuda.kernels import Kernels
from sdrt.engine.protocol import check_feeds
from sdrt.engine.sampling import SamplingProgram, SamplingResult, TextInput
from sdrt.errors import BackendError

from .loaded_plan import LoadedPlan, ShapeBinding

log = logging.getLogger(__name__)
MAX_GRAPHS = 4
PROGRAM_BUFFERS = ("history", "coefficients", "timesteps")


@dataclass(frozen=True, slots=True)
class ProgramBindings:
    """The bindings that a program runs: the UNet's by rows per image, and those of the text encoder
    and of the decoder, which takes one image, where they take part.
    """

    unet: dict[int, ShapeBinding]
    encoder: ShapeBinding | None
    decoder: ShapeBinding | None

    @property
    def all(self) -> list[ShapeBinding]:
        bindings = (*self.unet.values(), self.encoder, self.decoder)
        return [binding for binding in bindings if binding]


class SamplingGraph:
    """Buffers and the CUDA graph of one layout of programs."""

    def __init__(
        self,
        plans: "ProgramPlans",
        kernels: Mapping[str, Kernels],
        program: SamplingProgram,
        bindings: ProgramBindings,
    ) -> None:
        """kernels: by dtype; the decoder's may differ from the UNet's"""
        self._plans, self._device = plans, plans.unet.device
        self._kernels = kernels[tensor_dtype(plans.unet, "sample")]
        self._decoder_kernels = (
            kernels[tensor_dtype(plans.decoder, "image")] if plans.decoder else self._kernels
        )
        self._graph: CudaGraph | None = None
        self._arena_version, self._capturable = -1, True
        self._weights_versions: list[int] = []
        self._bindings = bindings
        self._buffers: dict[str, MirroredBuffer] = {}
        try:
            for name, (shape, dtype) in self._buffer_specs(program).items():
                self._buffers[name] = MirroredBuffer(self._device, shape, dtype)
        except BackendError:
            self.close()
            raise

    def _buffer_specs(self, program: SamplingProgram) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the buffers that belong to this graph alone."""
        images, _, *shape = program.history.shape
        arrays = {
            "history": program.history,
            "coefficients": program.coefficients,
            "timesteps": program.timesteps,
        }
        specs = {name: (array.shape, "float32") for name, array in arrays.items()}
        specs["latents"] = (images, *shape), "float32"
        if program.text and self._bindings.encoder:
            ids = program.text.ids.shape
            specs |= {"weights": (ids, "float32"), "chunk_indices": (ids[:-1], "int32")}
            specs["sums"] = self._bindings.encoder.tensors["input_ids"].array.shape, "float32"
        if self._bindings.decoder:
            _, channels, *sides = self._bindings.decoder.tensors["image"].array.shape
            specs["pixels"] = (images, *sides, channels), "uint8"
            specs["not_finite"] = (images,), "int32"
        return specs

    def run(self, program: SamplingProgram, bindings: ProgramBindings) -> SamplingResult:
        """See `ProgramEngine.run_program`; bindings: for this program's shapes"""
        pairs = zip(bindings.all, self._bindings.all, strict=True)
        rebound = any(new is not old for new, old in pairs)
        self._bindings = bindings
        self._fill(program)
        if rebound or not self._is_current():
            self._prepare(program)
        if self._graph is None:
            self._enqueue_all(program)
        else:
            self._graph.launch()
        self._device.synchronize()
        latents, pixels = self._buffers["latents"].array.copy(), self._buffers.get("pixels")
        if pixels is None:
            return SamplingResult(latents)
        finite = [not count for count in self._buffers["not_finite"].array]
        return SamplingResult(latents, pixels.array.copy(), finite)

    def _is_current(self) -> bool:
        """Whether there is a graph, of the arena and the weights that there are."""
        if self._graph is None or self._arena_version != self._device.arena_version:
            return False
        return self._weights_versions == self._plans.weights_versions

    def _fill(self, program: SamplingProgram) -> None:
        """Copy the program's inputs into pinned memory."""
        self._buffers["history"].array[...] = program.history
        self._buffers["coefficients"].array[...] = program.coefficients
        self._buffers["timesteps"].array[...] = program.timesteps
        if program.text and self._bindings.encoder:
            ids, indices = unique_chunks(program.text)
            self._bindings.encoder.tensors["input_ids"].array[...] = ids
            self._buffers["chunk_indices"].array[...] = indices
            self._buffers["weights"].array[...] = program.text.weights
        for rows, binding in self._bindings.unet.items():
            for name, value in unet_feeds(program, rows).items():
                binding.tensors[name].array[...] = value

    def _prepare(self, program: SamplingProgram) -> None:
        """Capture the graph; without one, kernels are launched one by one."""
        pairs = self._plans.pairs(self._bindings)
        while not all([plan.prepare(binding) for plan, binding in pairs]):
            continue  # one of them moved the arena under another
        self.close_graph()
        self._arena_version = self._device.arena_version
        self._weights_versions = self._plans.weights_versions
        self._capturable &= all([plan.is_capturable(binding) for plan, binding in pairs])
        if not self._capturable:
            return
        self._upload(program)  # the text encoder must not see ids out of its range
        for plan, binding in pairs:
            plan.warm_up(binding)
        try:
            with self._device.capture() as graph:
                self._enqueue_all(program)
        except BackendError as error:
            log.warning("Sampling runs without a CUDA graph, kernel by kernel: %s", error)
            self._capturable = False
            return
        self._graph = graph

    def _enqueue_all(self, program: SamplingProgram) -> None:
        """Put the complete program into the stream."""
        self._upload(program)
        if program.text:
            self._enqueue_text(program.text)
        self._enqueue_evaluations(program)
        self._enqueue_results(program)

    def _upload(self, program: SamplingProgram) -> None:
        """Copy the program's inputs to the GPU."""
        for name in (*PROGRAM_BUFFERS, "chunk_indices", "weights"):
            if name in self._buffers:
                self._buffers[name].upload()
        if self._bindings.encoder:
            self._bindings.encoder.tensors["input_ids"].upload()
        for rows, binding in self._bindings.unet.items():
            for name in unet_feeds(program, rows):
                binding.tensors[name].upload()

    def _enqueue_text(self, text: TextInput) -> None:
        """Encode the text, and write it into every context that the UNet reads."""
        encoder, buffers = self._bindings.encoder, self._buffers
        assert encoder is not None and self._plans.encoder is not None
        self._plans.encoder.enqueue(encoder)
        contexts, sums = encoder.tensors["contexts"], buffers["sums"].address
        unique, layers, tokens, width = contexts.array.shape
        sizes = layers, layers - 1 - text.clip_skip, tokens, width
        self._kernels("sum_tokens", unique * tokens, contexts.address, sums, unique, *sizes)
        images, stored_rows, chunks, _ = text.ids.shape
        for rows, binding in self._bindings.unet.items():
            context = binding.tensors["context"]
            self._kernels(
                "write_context",
                context.array.size,
                contexts.address,
                sums,
                buffers["chunk_indices"].address,
                buffers["weights"].address,
                context.address,
                *(images, stored_rows, rows, chunks, *sizes),
            )

    def _enqueue_evaluations(self, program: SamplingProgram) -> None:
        images, _, *shape = program.history.shape
        for k in range(len(program.rows_per_image) + 1):
            if k:
                binding = self._bindings.unet[program.rows_per_image[k - 1]]
                self._plans.unet.enqueue(binding)
            arguments = self._advance_arguments(program, k)
            self._kernels("advance_images", images * int(np.prod(shape)), *arguments)

    def _advance_arguments(self, program: SamplingProgram, k: int) -> tuple[Any, ...]:
        """Arguments of `advance_images` after k evaluations."""
        history, coefficients, timesteps = (self._buffers[name] for name in PROGRAM_BUFFERS)
        count = len(program.rows_per_image)
        images, columns, *shape = program.history.shape
        before = self._bindings.unet[program.rows_per_image[k - 1]].tensors if k else {}
        after = self._bindings.unet[program.rows_per_image[k]].tensors if k < count else {}
        size = int(np.prod(shape))
        return (
            coefficients.address + k * coefficients.array[0].nbytes,
            timesteps.address + min(k, count - 1) * timesteps.array[0].nbytes,
            history.address,
            before["output"].address if before else 0,
            after["sample"].address if after else 0,
            after["timestep"].address if after else 0,
            images,
            columns,
            size,
            after["sample"].array[0].size if after else size,
            program.rows_per_image[k - 1] if before else 1,
            program.rows_per_image[k] if after else 1,
            program.columns_per_output,
            program.output_columns[k - 1] if before else 0,
            program.state_columns[k],
        )

    def _enqueue_results(self, program: SamplingProgram) -> None:
        """Copy every image's latents, and its pixels where there is a decoder, to the host."""
        buffers, decoder, plan = self._buffers, self._bindings.decoder, self._plans.decoder
        images, columns = program.history.shape[:2]
        latents = buffers["latents"].array
        for i in range(images):
            column = i * columns + program.state_columns[-1]
            result = buffers["history"].address + column * latents[i].nbytes
            self._device.download(latents[i], result)
            if decoder is None or plan is None:
                continue
            size, pixels = latents[i].size, buffers["pixels"]
            not_finite = buffers["not_finite"].address + 4 * i
            source = decoder.tensors["latents"].address
            image = decoder.tensors["image"].address
            self._decoder_kernels("write_latents", size, result, source, not_finite, size)
            plan.enqueue(decoder)
            count = pixels.array[i].size // 3
            target = pixels.address + i * pixels.array[i].nbytes
            self._decoder_kernels("write_pixels", count, image, target, not_finite, count)
        for name in ("pixels", "not_finite"):
            if name in buffers:
                buffers[name].download()

    def close_graph(self) -> None:
        if self._graph:
            self._graph.close()
        self._graph = None

    def close(self) -> None:
        self.close_graph()
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()


def unet_feeds(program: SamplingProgram, rows: int) -> dict[str, np.ndarray]:
    """The UNet's inputs before the first evaluation, at this many rows per image; without a context
    that the text encoder writes.
    """
    images, _, channels, *sides = program.history.shape
    extra = program.extra_channels
    sample = np.zeros((images, rows, channels + extra.shape[1], *sides), np.float32)
    sample[:, :, channels:] = extra[:, None]
    conditioning = {
        name: value[:, -rows:].reshape(-1, *value.shape[2:])
        for name, value in program.conditioning.items()
    }
    timestep = np.zeros(images * rows, np.float32)
    return {"sample": sample.reshape(-1, *sample.shape[2:]), "timestep": timestep, **conditioning}


def unique_chunks(text: TextInput) -> tuple[np.ndarray, np.ndarray]:
    """The different chunks [U, tokens] int32, and the index of each chunk [B, rows, chunks]."""
    *shape, tokens = text.ids.shape
    ids, indices = np.unique(text.ids.reshape(-1, tokens), axis=0, return_inverse=True)
    return ids.astype(np.int32), indices.reshape(shape).astype(np.int32)


@dataclass(frozen=True, slots=True)
class ProgramPlans:
    """The loaded plans that a program runs."""

    unet: LoadedPlan
    encoder: LoadedPlan | None
    decoder: LoadedPlan | None

    @property
    def weights_versions(self) -> list[int]:
        """Of every plan's `weights_version`."""
        plans = (self.unet, self.encoder, self.decoder)
        return [plan.weights_version for plan in plans if plan]

    def pairs(self, bindings: ProgramBindings) -> list[tuple[LoadedPlan, ShapeBinding]]:
        """Every binding with its plan."""
        unet = [(self.unet, binding) for binding in bindings.unet.values()]
        others = [(self.encoder, bindings.encoder), (self.decoder, bindings.decoder)]
        return [*unet, *((plan, binding) for plan, binding in others if plan and binding)]

    def bind(self, program: SamplingProgram) -> ProgramBindings:
        """The bindings for a program's shapes.

        Raises:
            BackendError: A plan has no profile for them.
            UsageError: An input does not fit the UNet.
        """
        encoder = decoder = None
        unet = {
            rows: self._bind_unet(program, rows) for rows in sorted(set(program.rows_per_image))
        }
        if program.text and self.encoder:
            encoder = self.encoder.bind({"input_ids": unique_chunks(program.text)[0].shape})
        if self.decoder:
            decoder = self.decoder.bind({"latents": (1, *program.history.shape[2:])})
        return ProgramBindings(unet, encoder, decoder)

    def _bind_unet(self, program: SamplingProgram, rows: int) -> ShapeBinding:
        inputs, feeds = self.unet.component.inputs, unet_feeds(program, rows)
        if program.text:
            width = {spec.name: spec.shape for spec in inputs}["context"][-1]
            images, _, chunks, tokens = program.text.ids.shape
            feeds["context"] = np.zeros((images * rows, chunks * tokens, int(width)), np.int8)
        feeds = check_feeds("unet", inputs, feeds)
        return self.unet.bind({name: value.shape for name, value in feeds.items()})


class SamplingGraphCache:
    """The sampling graphs of one loaded UNet; the least recently used are evicted."""

    def __init__(self, plan: LoadedPlan, target: str) -> None:
        self._plan, self._target = plan, target
        self._kernels: dict[str, Kernels] = {}
        self._graphs: OrderedDict[tuple[object, ...], SamplingGraph] = OrderedDict()

    def run(
        self, program: SamplingProgram, encoder: LoadedPlan | None, decoder: LoadedPlan | None
    ) -> SamplingResult:
        """See `ProgramEngine.run_program`; the caller holds the device."""
        plans = ProgramPlans(self._plan, encoder, decoder)
        for plan, name in ((self._plan, "sample"), (decoder, "image")):
            if plan and (dtype := tensor_dtype(plan, name)) not in self._kernels:
                self._kernels[dtype] = Kernels(plan.device, self._target, dtype)
        bindings = plans.bind(program)
        ids = bindings.encoder.tensors["input_ids"].array.shape if bindings.encoder else None
        layout = (program.layout, ids, encoder, decoder)
        if layout not in self._graphs:
            self._graphs[layout] = SamplingGraph(plans, self._kernels, program, bindings)
        self._graphs.move_to_end(layout)
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)[1].close()
        return self._graphs[layout].run(program, bindings)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        for kernels in self._kernels.values():
            kernels.close()
        self._kernels.clear()


def tensor_dtype(plan: LoadedPlan, name: str) -> str:
    """The dtype of one of a plan's inputs or outputs."""
    specs = (*plan.component.inputs, *plan.component.outputs)
    return {spec.name: spec.dtype for spec in specs}[name]
