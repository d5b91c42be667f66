"""Components on PyTorch with its fused attention: for GPUs that nothing else serves.

Knows torch and onnx. The bundle's graph stays the only description of a component: its nodes run
one by one as torch operations, `Attention` as `scaled_dot_product_attention`, with the weights
taken from the same safetensors file; or, compiled, all at once (see `compile`).
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import safe_open
from torch import Tensor

from sdrt.bundle.manifest import Component
from sdrt.engine.call_once import call_once
from sdrt.engine.gpu import GPU_LOCK
from sdrt.engine.protocol import Feeds, check_feeds
from sdrt.errors import BackendError

from .compile import Compiled, compiled, fold_constants
from .cuda_graph import CudaGraphCache
from .float32 import ieee_float32
from .ops import OPERATIONS, Attributes
from .placement import place_constants

log = logging.getLogger(__name__)
MAX_SHAPES = 8  # compiled at a time, of one component
# A function, and the weights and constants that follow a graph's inputs as its arguments.
CompiledFor = tuple[Compiled, list[str], list[Tensor]]


@call_once
def initialise() -> None:
    """Torch's NumPy interface, in both directions."""
    torch.from_numpy(np.zeros(1, np.float32)).numpy()


def explain_missing_device(device: str) -> str | None:
    """Why torch cannot compute on a device; None if it can."""
    if device == "mps":
        return None if torch.backends.mps.is_available() else "this torch has no Metal support"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no GPU; install a build for CUDA or ROCm"


class TorchEngine:
    """One graph, its weights on the device. Shapes stay on the host, where the graph reads them.

    compile: by `torch.compile`, once for every set of input shapes; the least recently used go
    cuda_graphs: replay CUDA graphs, on CUDA alone
    """

    def __init__(
        self,
        name: str,
        graph: Path,
        component: Component,
        device: str,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.name = name
        self.inputs, self.outputs = component.inputs, component.outputs
        self.device = torch.device(device)
        model = onnx.load(graph, load_external_data=False)
        unknown = {node.op_type for node in model.graph.node} - set(OPERATIONS)
        if unknown:
            raise BackendError(
                f"{name} has nodes that the torch backend does not know: "
                f"{', '.join(sorted(unknown))}; choose --backend onnxruntime"
            )
        self._graph = graph
        self._refitted: set[str] = set()
        self._compile = compile
        self._weights = _weights(model.graph)
        nodes = [
            (OPERATIONS[n.op_type], list(n.input), list(n.output), _attributes(n))
            for n in model.graph.node
        ]
        self._kinds = [node.op_type for node in model.graph.node]
        constants = _constants(model.graph)
        read_there = {*self._weights, *(spec.name for spec in self.inputs)}
        with self._use_device():
            self._nodes, self._values = place_constants(
                nodes, self._kinds, constants, read_there, self.device
            )
            self._values |= self._stored_weights(self._weights)
        self._last_use = _last_uses(model.graph.node, {s.name for s in self.outputs})
        self._compiled: OrderedDict[object, CompiledFor] = OrderedDict()
        self._compiling, self._order = threading.Lock(), threading.Lock()
        self._graphs = CudaGraphCache(name, MAX_SHAPES) if cuda_graphs else None

    @contextmanager
    def _use_device(self) -> Iterator[None]:
        """Compute or allocate: one thread at a time on a GPU, in full float32. Whatever torch
        raises is a BackendError.
        """
        try:
            if self.device.type == "cpu":
                yield
            else:
                with GPU_LOCK, ieee_float32():
                    yield
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"{self.device} is out of memory in {self.name}: {_first_line(error)}",
                hint="generate fewer or smaller images at once",
            ) from error
        except (RuntimeError, IndexError) as error:  # of torch, its compilers and the driver
            raise BackendError(
                f"torch failed in {self.name} on {self.device}: {_first_line(error)}",
                hint="run without compiling" if self._compile else None,
            ) from error

    @torch.inference_mode()
    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        ready = check_feeds(self.name, self.inputs, feeds)
        with self._use_device():
            stored = self._values  # never changed: others take its place
            if not stored:
                raise BackendError(f"{self.name} is closed")
            fed = {name: torch.from_numpy(array).to(self.device) for name, array in ready.items()}
            compute = partial(self._at_once if self._compile else self._one_by_one, stored=stored)
            results = self._graphs.run(compute, fed) if self._graphs else compute(fed)
            return {s.name: v.cpu().numpy() for s, v in zip(self.outputs, results, strict=True)}

    def _one_by_one(self, fed: Mapping[str, Tensor], stored: Mapping[str, Any]) -> list[Tensor]:
        values: dict[str, Any] = {"": None, **fed}
        for i, (operation, sources, targets, attributes) in enumerate(self._nodes):
            inputs = [values[s] if s in values else stored[s] for s in sources]
            results = operation(inputs, attributes)
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(targets, results, strict=False))
            for name in self._last_use.get(i, ()):
                values.pop(name, None)
        return [values[spec.name] for spec in self.outputs]

    def _at_once(self, fed: Mapping[str, Tensor], stored: Mapping[str, Any]) -> list[Tensor]:
        shapes = tuple(value.shape for value in fed.values())
        if (compiled_call := self._known(shapes)) is not None:
            return _run(compiled_call, fed, stored)
        with self._compiling:  # by one thread; the others find it
            if (compiled_call := self._known(shapes)) is not None:
                return _run(compiled_call, fed, stored)
            log.info("%s is compiled for %s", self.name, [list(shape) for shape in shapes])
            compiled_call = self._compiled_for(fed, stored)
            results = _run(compiled_call, fed, stored)  # torch compiles when it is first called
            with self._order:
                self._compiled[shapes] = compiled_call
                if len(self._compiled) > MAX_SHAPES:
                    self._compiled.popitem(last=False)
        return results

    def _known(self, shapes: object) -> CompiledFor | None:
        """What was compiled for these shapes, which become the most recently used."""
        with self._order:
            if shapes in self._compiled:
                self._compiled.move_to_end(shapes)
            return self._compiled.get(shapes)

    def _compiled_for(self, fed: Mapping[str, Tensor], stored: Mapping[str, Any]) -> CompiledFor:
        """For these shapes: a function, and the weights and constants that follow its inputs."""
        weights = {name: stored[name] for name in self._weights}
        others = {n: value for n, value in stored.items() if n not in weights}
        steps, read = fold_constants(self._nodes, self._kinds, {**fed, **weights}, others)
        outputs = [spec.name for spec in self.outputs]
        run = compiled(steps, [*fed, *weights, *read], outputs)
        return run, list(weights), [value.to(self.device) for value in read.values()]

    def refit(self, weights: Feeds) -> None:
        """Weights are never compiled in, so the tensors are put in each other's place."""
        with self._use_device():
            changed = self._stored_weights(self._refitted - set(weights))
            changed |= {name: self._placed(torch.tensor(array)) for name, array in weights.items()}
            self._values = self._values | changed
            self._refitted = set(weights)
            if self._graphs is not None:
                self._graphs.clear()

    def _stored_weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights of the bundle's file, on the device."""
        with safe_open(self._graph.with_name("model.safetensors"), framework="pt") as file:
            return {name: self._placed(file.get_tensor(name)) for name in names}

    def close(self) -> None:
        self._values = {}
        with self._order:
            self._compiled.clear()
        with self._use_device():
            if self._graphs is not None:
                self._graphs.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # for whatever else runs on the GPU

    def _placed(self, weight: Tensor) -> Tensor:
        """A weight on the device; compiled convolutions on CUDA want channels last."""
        last = self._compile and self.device.type == "cuda" and weight.ndim == 4
        order = torch.channels_last if last else torch.contiguous_format
        return weight.to(self.device, memory_format=order)


def _run(
    compiled_call: CompiledFor, fed: Mapping[str, Tensor], stored: Mapping[str, Any]
) -> list[Tensor]:
    run, weights, constants = compiled_call
    return run([*fed.values(), *(stored[name] for name in weights), *constants])


def _last_uses(nodes: Sequence[Any], outputs: set[str]) -> dict[int, list[str]]:
    """For each node, the values that nothing reads after it."""
    last = {name: i for i, node in enumerate(nodes) for name in node.input if name}
    released: dict[int, list[str]] = {}
    for name, i in last.items():
        if name not in outputs:
            released.setdefault(i, []).append(name)
    return released


def _weights(graph: Any) -> list[str]:
    """The initializers that lie in the safetensors file."""
    external = onnx.TensorProto.EXTERNAL
    return [t.name for t in graph.initializer if t.data_location == external]


def _constants(graph: Any) -> dict[str, Tensor]:
    """All others, on the host: scalars and shapes."""
    return {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL
    }


def _first_line(error: Exception) -> str:
    """The fault; torch's advice on debugging kernels follows it."""
    return str(error).partition("\n")[0]


def _attributes(node: Any) -> Attributes:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
