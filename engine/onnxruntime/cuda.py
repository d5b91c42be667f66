"""Components on ONNX Runtime with CUDA. Knows onnxruntime; imported only when it is chosen.

Inputs and outputs stay in GPU memory at fixed addresses for each set of shapes, so that a CUDA
graph replays the whole component. Never run on a GPU yet.
"""

import logging
import os
from collections import OrderedDict
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
from sdrt.engine.plans import Plan, key_of, plan_of, plans_folder
from sdrt.engine.protocol import Feeds, check_feeds
from sdrt.errors import BackendError, ParityError, UsageError

from .session import options_with, session

log = logging.getLogger(__name__)
PROVIDER = "CUDAExecutionProvider"
MAX_SHAPES = 8
FUSED = ("unet", "vae_decoder", "vae_encoder")
SEARCHES = ("DEFAULT", "HEURISTIC", "EXHAUSTIVE")


@dataclass(frozen=True, slots=True)
class OrtCudaOptions:
    """How ONNX Runtime uses the GPU.

    tf32: products of single precision in TensorFloat-32, which rounds to 10 bits
    conv_search: how convolutions are chosen: DEFAULT, HEURISTIC or EXHAUSTIVE
    graphs: replay CUDA graphs. nhwc: convolutions with channels last
    fused: ONNX Runtime's own fused attention and group normalisation, see `fusion`
    """

    tf32: bool = False
    conv_search: str = "HEURISTIC"
    graphs: bool = True
    nhwc: bool = False
    fused: bool = True

    @classmethod
    def from_text(cls, text: str) -> "OrtCudaOptions":
        """`"tf32=1,conv_search=EXHAUSTIVE"`, as `$SDRT_ORT_CUDA` has it; raises UsageError."""
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

    def settings(self, device: int, stream: int = 0) -> dict[str, str]:
        """The provider's own options; stream: the caller's own, 0 for none"""
        return {
            **({"user_compute_stream": str(stream)} if stream else {}),
            "device_id": str(device),
            "use_tf32": str(int(self.tf32)),
            "cudnn_conv_algo_search": self.conv_search,
            "cudnn_conv_use_max_workspace": "1",
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": str(int(self.graphs)),
            "prefer_nhwc": str(int(self.nhwc)),
        }


@dataclass(slots=True)
class _Bound:
    """One set of shapes: its buffers on the GPU and the number of its CUDA graph."""

    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    run: Any


class OrtCudaEngine:
    """One session on one GPU, with buffers and a CUDA graph for each of the last few shapes."""

    def __init__(
        self,
        name: str,
        graph: Path,
        component: Component,
        device: int,
        place: str = "cuda",
        stream: int = 0,
        derived: Plan | None = None,
    ) -> None:
        """place: cuda; the tests bind the same way on the cpu
        derived: another graph over the same weights
        stream: the caller's own, by its address; 0 for one of ONNX Runtime's
        """
        self.name = name
        self.inputs, self.outputs = component.inputs, component.outputs
        self._graph, self._device, self._place = graph, device, place
        self._stream, self._derived = stream, derived
        self._bound: OrderedDict[tuple[Any, ...], _Bound] = OrderedDict()
        self._graphs = 0
        self._weights: Feeds = {}
        self._open()

    def _open(self) -> None:
        chosen = OrtCudaOptions.from_text(os.environ.get("SDRT_ORT_CUDA", ""))
        provider, settings = "CPUExecutionProvider", dict[str, str]()
        if self._place == "cuda":
            ort.preload_dlls()  # CUDA and cuDNN from their wheels, where they are installed so
            provider, settings = PROVIDER, chosen.settings(self._device, self._stream)
        given = self.name, self._graph, options_with(self._weights), provider, settings
        with GPU_LOCK:
            if self._derived is None:
                self._session: ort.InferenceSession | None = session(*given)
                return
            with self._derived.verified() as content:
                self._session = session(*given, derived=bytes(content))

    def refit(self, weights: Feeds) -> None:
        """Another session in the first one's place: its weights are where its kernels want them."""
        if weights or self._weights:
            self.close()
            self._weights = {n: np.ascontiguousarray(array) for n, array in weights.items()}
            self._open()

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        if self._session is None:
            raise BackendError(f"{self.name} is closed")
        ready = check_feeds(self.name, self.inputs, feeds)
        with GPU_LOCK:
            return self._run(ready)

    def _run(self, ready: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:  # closed while the call waited
            raise BackendError(f"{self.name} is closed")
        shapes = tuple(array.shape for array in ready.values())
        try:
            if shapes not in self._bound:
                self._bound[shapes] = self._bind(ready)
            self._bound.move_to_end(shapes)
            bound = self._bound[shapes]
            for name, array in ready.items():
                bound.inputs[name].update_inplace(array)
            self._session.run_with_iobinding(bound.binding, bound.run)
            # The next call writes over what lies in the buffers.
            found = {name: np.array(value.numpy()) for name, value in bound.outputs.items()}
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise BackendError(
                f"ONNX Runtime failed in {self.name} on GPU {self._device}: {error}; "
                "with less memory try fewer pictures at once"
            ) from error
        while len(self._bound) > MAX_SHAPES:
            self._bound.popitem(last=False)
        return found

    def _bind(self, ready: dict[str, np.ndarray]) -> _Bound:
        """Buffers for these shapes. A first run outside any graph tells the outputs' shapes."""
        assert self._session is not None
        binding = self._session.io_binding()
        inputs = {name: self._on_gpu(array) for name, array in ready.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for spec in self.outputs:
            binding.bind_output(spec.name, self._place, self._device)
        self._session.run_with_iobinding(binding, _run_options(-1))
        made = binding.get_outputs()
        outputs = {spec.name: value for spec, value in zip(self.outputs, made, strict=True)}
        binding.clear_binding_outputs()
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._graphs += 1
        return _Bound(binding, inputs, outputs, _run_options(self._graphs))

    def _on_gpu(self, array: np.ndarray) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, self._place, self._device)

    def close(self) -> None:
        with GPU_LOCK:
            self._bound.clear()
            self._session = None


def load_engine(
    bundle: Bundle, name: str, gpu: Gpu, stream: int = 0, place: str = "cuda"
) -> OrtCudaEngine:
    """A component with fused operators where its graph has them, proven once against the bundle's
    graph; without, and with a warning, where they do not load or compute something else.
    """
    component, graph = bundle.manifest.components[name], bundle.graph(name)
    plain = partial(OrtCudaEngine, name, graph, component, gpu.index, place, stream)
    if not OrtCudaOptions.from_text(os.environ.get("SDRT_ORT_CUDA", "")).fused or name not in FUSED:
        return plain()
    try:
        plan = _fused_plan(bundle, name, gpu, norms=place == "cuda")
        engine = plain(derived=plan)
        validate_plan(bundle, name, engine, plan)
    except (BackendError, ParityError) as error:
        log.warning("%s runs without fused operators: %s", name, error)
        return plain()
    return engine


def _fused_plan(bundle: Bundle, name: str, gpu: Gpu, *, norms: bool) -> Plan:
    """The derived graph, from the cache or made."""
    key = key_of(
        bundle,
        name,
        kind="onnxruntime-fused" if norms else "onnxruntime-fused-attention",
        version=ort.__version__,
        targets=(gpu.sm,),
        gpu=gpu.name,
    )

    def build(out: Path) -> tuple[float, int]:
        try:
            from .fusion import write_fused
        except ImportError as error:
            raise BackendError(f"making them needs {error.name}; pip install onnx") from error
        return write_fused(bundle.graph(name), out, norms=norms)

    return plan_of(plans_folder(bundle), key, build)


def _run_options(graph: int) -> Any:
    """graph: the number of a CUDA graph, -1 for none"""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options
