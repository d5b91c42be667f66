"""Components on ONNX Runtime with CUDA. Imports onnxruntime, so import it only where it is used.

For each set of shapes inputs and outputs are bound to fixed buffers in GPU memory, so that a CUDA
graph replays the complete component. ONNX Runtime captures for each thread that calls, and frees
what it captured with the session: so one thread runs all sessions, and a session that has captured
`MAX_GRAPHS` is opened again. Not yet run on a GPU.
"""

import functools
import logging
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import Component
from sdrt.engine.gpu import GPU_LOCK, Gpu
from sdrt.engine.parity import validate_plan
from sdrt.engine.plans import BuildSettings, Plan, get_or_build_plan, plan_key, plans_folder
from sdrt.engine.protocol import Feeds, check_feeds
from sdrt.errors import BackendError, ParityError, UsageError

from .cuda_libraries import preload_cuda_libraries
from .session import create_session, options_with

log = logging.getLogger(__name__)
PROVIDER = "CUDAExecutionProvider"
MAX_SHAPES = 8
MAX_GRAPHS = 32  # captured by one session
REFUSED = "graph capture"  # what ONNX Runtime says of a graph with nodes on the host
FUSED = ("unet", "vae_decoder", "vae_encoder")
SEARCHES = ("DEFAULT", "HEURISTIC", "EXHAUSTIVE")


@dataclass(frozen=True, slots=True)
class OrtDevice:
    """Where a session runs.

    Attributes:
        index: The GPU, as CUDA numbers them.
        kind: `cuda`; tests bind buffers in the same way on `cpu`.
        stream: The address of the caller's CUDA stream; 0 for one of ONNX Runtime's.
    """

    index: int = 0
    kind: str = "cuda"
    stream: int = 0


@dataclass(frozen=True, slots=True)
class OrtCudaOptions:
    """How ONNX Runtime uses the GPU.

    Attributes:
        tf32: Multiply float32 matrices in TensorFloat-32, which rounds to 10 bits.
        conv_search: How convolution algorithms are chosen: DEFAULT, HEURISTIC or EXHAUSTIVE.
        graphs: Replay CUDA graphs.
        nhwc: Convolutions with channels last.
        fused: ONNX Runtime's fused attention and group normalisation, see `fusion`.
    """

    tf32: bool = False
    conv_search: str = "HEURISTIC"
    graphs: bool = True
    nhwc: bool = False
    fused: bool = True

    @classmethod
    def from_text(cls, text: str) -> "OrtCudaOptions":
        """Parse `"tf32=1,conv_search=EXHAUSTIVE"`, from `$SDRT_ORT_CUDA`; raises UsageError."""
        values: dict[str, Any] = {}
        kinds = {field.name: field.type for field in fields(cls)}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            allowed = SEARCHES if name == "conv_search" else ("0", "1")
            if name not in kinds or value not in allowed:
                raise UsageError(
                    f"SDRT_ORT_CUDA has {part!r}; expected tf32, graphs, nhwc or fused =0 or =1, "
                    f"or conv_search={'|'.join(SEARCHES)}"
                )
            values[name] = value if name == "conv_search" else value == "1"
        return cls(**values)

    def provider_options(self, device: OrtDevice) -> dict[str, str]:
        """The options of ONNX Runtime's CUDA execution provider."""
        return {
            **({"user_compute_stream": str(device.stream)} if device.stream else {}),
            "device_id": str(device.index),
            "use_tf32": str(int(self.tf32)),
            "cudnn_conv_algo_search": self.conv_search,
            "cudnn_conv_use_max_workspace": "1",
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": str(int(self.graphs)),
            "prefer_nhwc": str(int(self.nhwc)),
        }


@dataclass(slots=True)
class BoundBuffers:
    """One set of shapes: its I/O binding, its buffers, and the run options with its graph's id."""

    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    run_options: Any


class OrtCudaEngine:
    """One session on one GPU, with buffers and a CUDA graph for each of the last few shapes."""

    def __init__(
        self,
        name: str,
        graph: Path,
        component: Component,
        device: OrtDevice,
        derived: Plan | None = None,
    ) -> None:
        """derived: another graph over the same weights"""
        self.name = name
        self.inputs, self.outputs = component.inputs, component.outputs
        self._graph, self._device, self._derived = graph, device, derived
        self._bound: OrderedDict[tuple[Any, ...], BoundBuffers] = OrderedDict()
        self._graph_count = 0
        self._has_graphs = True
        self._weights: Feeds = {}
        self._open()

    def _open(self) -> None:
        """Open the session; without CUDA graphs where ONNX Runtime refuses them for this graph."""
        chosen = OrtCudaOptions.from_text(os.environ.get("SDRT_ORT_CUDA", ""))
        self._has_graphs = self._has_graphs and chosen.graphs
        provider, settings = "CPUExecutionProvider", dict[str, str]()
        if self._device.kind == "cuda":
            preload_cuda_libraries()
            provider, settings = PROVIDER, chosen.provider_options(self._device)
            settings["enable_cuda_graph"] = str(int(self._has_graphs))
        with GPU_LOCK:
            self._graph_count = 0
            try:
                self._session: ort.InferenceSession | None = self._create(provider, settings)
            except BackendError as error:
                if not self._has_graphs or REFUSED not in error.message:
                    raise
                log.warning("%s runs without CUDA graphs: %s", self.name, error.message)
                self._has_graphs = False
                settings["enable_cuda_graph"] = "0"
                self._session = self._create(provider, settings)

    def _create(self, provider: str, settings: dict[str, str]) -> ort.InferenceSession:
        arguments = self.name, self._graph, options_with(self._weights), provider, settings
        if self._derived is None:
            return create_session(*arguments)
        with self._derived.verified() as content:
            return create_session(*arguments, derived=bytes(content))

    def refit(self, weights: Feeds) -> None:
        """Open another session: a session cannot replace its weights."""
        if weights or self._weights:
            with GPU_LOCK:  # no call comes between the two sessions
                self.close()
                self._weights = {n: np.ascontiguousarray(array) for n, array in weights.items()}
                self._open()

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        arrays = check_feeds(self.name, self.inputs, feeds)
        return _runner().submit(self._run_alone, arrays).result()

    def _run_alone(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with GPU_LOCK:
            if self._session is None:
                raise BackendError(f"{self.name} is closed")
            return self._run(arrays)

    def _run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes = tuple(array.shape for array in arrays.values())
        if shapes not in self._bound and self._graph_count == MAX_GRAPHS:
            log.debug("%s is opened again, which frees its CUDA graphs", self.name)
            self.close()
            self._open()
        assert self._session is not None
        try:
            if shapes not in self._bound:
                self._bound[shapes] = self._bind(arrays)
            self._bound.move_to_end(shapes)
            bound = self._bound[shapes]
            for name, array in arrays.items():
                bound.inputs[name].update_inplace(array)
            self._session.run_with_iobinding(bound.binding, bound.run_options)
            # The next call writes over the buffers.
            outputs = {name: np.array(value.numpy()) for name, value in bound.outputs.items()}
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise BackendError(
                f"ONNX Runtime failed in {self.name} on GPU {self._device.index}: {error}",
                hint="if memory is short, generate fewer images at once",
            ) from error
        while len(self._bound) > MAX_SHAPES:
            self._bound.popitem(last=False)
        return outputs

    def _bind(self, arrays: dict[str, np.ndarray]) -> BoundBuffers:
        """Allocate buffers for these shapes; a first run without a graph gives the outputs'."""
        assert self._session is not None
        binding = self._session.io_binding()
        inputs = {name: self._copy_to_device(array) for name, array in arrays.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for spec in self.outputs:
            binding.bind_output(spec.name, self._device.kind, self._device.index)
        self._session.run_with_iobinding(binding, _run_options(-1))
        values = binding.get_outputs()
        outputs = {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}
        binding.clear_binding_outputs()
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        if not self._has_graphs:
            return BoundBuffers(binding, inputs, outputs, _run_options(-1))
        self._graph_count += 1
        return BoundBuffers(binding, inputs, outputs, _run_options(self._graph_count))

    def _copy_to_device(self, array: np.ndarray) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, self._device.kind, self._device.index)

    def close(self) -> None:
        with GPU_LOCK:
            self._bound.clear()
            self._session = None


@functools.cache
def _runner() -> ThreadPoolExecutor:
    """The thread that runs all sessions."""
    return ThreadPoolExecutor(1, thread_name_prefix="onnxruntime-cuda")


def load_engine(
    bundle: Bundle, name: str, gpu: Gpu, stream: int = 0, kind: str = "cuda"
) -> OrtCudaEngine:
    """Load a component with fused operators where its graph has them, validated once against the
    bundle's graph; without them, and with a warning, where they fail to load or to validate.
    """
    component, graph = bundle.manifest.components[name], bundle.graph(name)
    device = OrtDevice(gpu.index, kind, stream)
    create = partial(OrtCudaEngine, name, graph, component, device)
    if not OrtCudaOptions.from_text(os.environ.get("SDRT_ORT_CUDA", "")).fused or name not in FUSED:
        return create()
    try:
        plan = _fused_plan(bundle, name, gpu, norms=kind == "cuda")
        engine = create(derived=plan)
        validate_plan(bundle, name, engine, plan)
    except (BackendError, ParityError) as error:
        log.warning("%s runs without fused operators: %s", name, error)
        return create()
    return engine


def _fused_plan(bundle: Bundle, name: str, gpu: Gpu, *, norms: bool) -> Plan:
    """The graph with fused operators, from the cache or written now."""
    kind = "onnxruntime-fused" if norms else "onnxruntime-fused-attention"
    settings = BuildSettings(kind, ort.__version__, targets=(gpu.sm,), gpu=gpu.name)
    key = plan_key(bundle, name, settings)

    def build(out: Path) -> tuple[float, int]:
        try:
            from .fusion import write_fused_graph
        except ImportError as error:
            raise BackendError(
                f"fusing operators requires {error.name}", hint="pip install onnx"
            ) from error
        return write_fused_graph(bundle.graph(name), out, norms=norms)

    return get_or_build_plan(plans_folder(bundle), key, build)


def _run_options(graph: int) -> Any:
    """graph: the id of a CUDA graph, -1 for none"""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options
