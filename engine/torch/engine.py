"""Components on PyTorch with its fused attention: for GPUs that nothing else serves.

Knows torch and onnx. The bundle's graph stays the only description of a component: its nodes run
one by one as torch operations, `Attention` as `scaled_dot_product_attention`, with the weights
taken from the same safetensors file; or, compiled, all at once (see `compile`).
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from sdrt.bundle.manifest import Component
from sdrt.engine.gpu import ONE_AT_A_TIME
from sdrt.engine.once import once
from sdrt.engine.protocol import Feeds, checked_feeds
from sdrt.errors import BackendError

from .compile import Compiled, compiled, straightened

log = logging.getLogger(__name__)
MOST_SHAPES = 8  # compiled at a time, of one component
Attributes = dict[str, Any]
# A function, and the weights and constants that follow a graph's inputs as its arguments.
CompiledFor = tuple[Compiled, list[str], list[Tensor]]
TORCH_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


@once
def initialise() -> None:
    """Torch's NumPy interface, in both directions."""
    torch.from_numpy(np.zeros(1, np.float32)).numpy()


def available(device: str) -> str | None:
    """None if torch can compute on the device, else why not."""
    if device == "mps":
        return None if torch.backends.mps.is_available() else "this torch has no Metal support"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no GPU; install a build for CUDA or ROCm"


class TorchEngine:
    """One graph, its weights on the device. Shapes stay on the host, where the graph reads them.

    compile: by `torch.compile`, once for every set of input shapes; the least recently used go
    """

    def __init__(
        self, name: str, graph: Path, component: Component, device: str, compile: bool = False
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
        self._values = _constants(model.graph, self.device)
        self._weights = _weights(model.graph)
        with safe_open(graph.with_name("model.safetensors"), framework="pt") as file:
            self._values |= {n: self._placed(file.get_tensor(n)) for n in self._weights}
        self._nodes = [
            (OPERATIONS[n.op_type], list(n.input), list(n.output), _attributes(n))
            for n in model.graph.node
        ]
        self._kinds = [node.op_type for node in model.graph.node]
        self._last_use = _last_uses(model.graph.node, {s.name for s in self.outputs})
        self._compiled: OrderedDict[object, CompiledFor] = OrderedDict()
        self._compiling, self._order = threading.Lock(), threading.Lock()
        self._alone = nullcontext() if device == "cpu" else ONE_AT_A_TIME

    @torch.inference_mode()
    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        stored = self._values  # never changed: others take its place
        if not stored:
            raise BackendError(f"{self.name} is closed")
        ready = checked_feeds(self.name, self.inputs, feeds)
        with self._alone:
            fed = {name: torch.from_numpy(array).to(self.device) for name, array in ready.items()}
            made = (self._at_once if self._compile else self._one_by_one)(fed, stored)
            return {s.name: v.cpu().numpy() for s, v in zip(self.outputs, made, strict=True)}

    def _one_by_one(self, fed: dict[str, Tensor], stored: Mapping[str, Any]) -> list[Tensor]:
        values: dict[str, Any] = {"": None, **fed}
        for i, (operation, sources, targets, attributes) in enumerate(self._nodes):
            given = [values[s] if s in values else stored[s] for s in sources]
            made = operation(given, attributes)
            made = made if isinstance(made, tuple) else (made,)
            values.update(zip(targets, made, strict=False))
            for name in self._last_use.get(i, ()):
                values.pop(name, None)
        return [values[spec.name] for spec in self.outputs]

    def _at_once(self, fed: dict[str, Tensor], stored: Mapping[str, Any]) -> list[Tensor]:
        shapes = tuple(value.shape for value in fed.values())
        try:
            if (found := self._known(shapes)) is not None:
                return _run(found, fed, stored)
            with self._compiling:  # by one thread; the others find it
                if (found := self._known(shapes)) is not None:
                    return _run(found, fed, stored)
                log.info("%s is compiled for %s", self.name, [list(shape) for shape in shapes])
                found = self._compiled_for(fed, stored)
                made = _run(found, fed, stored)  # torch compiles when it is first called
        except RuntimeError as error:  # what torch's compilers raise is all of this
            with self._order:
                self._compiled.pop(shapes, None)
            raise BackendError(
                f"torch could not compile or run {self.name}: {error}; run without compiling"
            ) from error
        with self._order:
            self._compiled[shapes] = found
            if len(self._compiled) > MOST_SHAPES:
                self._compiled.popitem(last=False)
        return made

    def _known(self, shapes: object) -> CompiledFor | None:
        """What was compiled for these shapes, which become the most recently used."""
        with self._order:
            if shapes in self._compiled:
                self._compiled.move_to_end(shapes)
            return self._compiled.get(shapes)

    def _compiled_for(self, fed: dict[str, Tensor], stored: Mapping[str, Any]) -> CompiledFor:
        """For these shapes: a function, and the weights and constants that follow its inputs."""
        weights = {name: stored[name] for name in self._weights}
        others = {n: value for n, value in stored.items() if n not in weights}
        steps, read = straightened(self._nodes, self._kinds, fed | weights, others)
        outputs = [spec.name for spec in self.outputs]
        run = compiled(steps, [*fed, *weights, *read], outputs)
        return run, list(weights), [value.to(self.device) for value in read.values()]

    def refit(self, weights: Feeds) -> None:
        """Weights are never compiled in, so the tensors are put in each other's place."""
        with safe_open(self._graph.with_name("model.safetensors"), framework="pt") as file:
            old = self._refitted - set(weights)
            changed = {name: self._placed(file.get_tensor(name)) for name in old}
        changed |= {name: self._placed(torch.tensor(array)) for name, array in weights.items()}
        self._values = self._values | changed
        self._refitted = set(weights)

    def close(self) -> None:
        self._values = {}
        with self._order:
            self._compiled.clear()

    def _placed(self, weight: Tensor) -> Tensor:
        """A weight on the device; compiled convolutions on CUDA want channels last."""
        last = self._compile and self.device.type == "cuda" and weight.ndim == 4
        order = torch.channels_last if last else torch.contiguous_format
        return weight.to(self.device, memory_format=order)


def _run(found: CompiledFor, fed: Mapping[str, Tensor], stored: Mapping[str, Any]) -> list[Tensor]:
    run, weights, constants = found
    return run([*fed.values(), *(stored[name] for name in weights), *constants])


def _last_uses(nodes: Sequence[Any], kept: set[str]) -> dict[int, list[str]]:
    """For each node, the values that nothing reads after it."""
    last = {name: i for i, node in enumerate(nodes) for name in node.input if name}
    ends: dict[int, list[str]] = {}
    for name, i in last.items():
        if name not in kept:
            ends.setdefault(i, []).append(name)
    return ends


def _weights(graph: Any) -> list[str]:
    """The initializers that lie in the safetensors file."""
    external = onnx.TensorProto.EXTERNAL
    return [t.name for t in graph.initializer if t.data_location == external]


def _constants(graph: Any, device: torch.device) -> dict[str, Tensor]:
    """All others: floats to the device, the rest, mostly shapes, to the host."""
    values = {}
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            value = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            values[tensor.name] = value.to(device) if value.is_floating_point() else value
    return values


def _attributes(node: Any) -> Attributes:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _numbers(given: Tensor | list[float]) -> list[float]:
    """Of a tensor, or as they are where the graph is compiled."""
    if isinstance(given, list):
        return given
    numbers: list[float] = given.reshape(-1).tolist()
    return numbers


def _ints(given: Tensor | list[float]) -> list[int]:
    return [int(value) for value in _numbers(given)]


def _shape(given: list[Any], attributes: Attributes) -> Tensor:
    shape = list(given[0].shape)
    return torch.tensor(shape[attributes.get("start", 0) : attributes.get("end")])


def _reshape(given: list[Any], _: Attributes) -> Tensor:
    shape = _ints(given[1])
    sizes = [given[0].shape[i] if size == 0 else size for i, size in enumerate(shape)]
    reshaped: Tensor = given[0].reshape(sizes)
    return reshaped


def _divide(given: list[Any], _: Attributes) -> Tensor:
    a, b = given
    if a.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def _unsqueeze(given: list[Any], _: Attributes) -> Tensor:
    value: Tensor = given[0]
    for axis in sorted(_ints(given[1])):
        value = value.unsqueeze(axis)
    return value


def _squeeze(given: list[Any], _: Attributes) -> Tensor:
    value: Tensor = given[0]
    return value.squeeze(tuple(_ints(given[1]))) if len(given) > 1 else value.squeeze()


def _gather(given: list[Any], attributes: Attributes) -> Tensor:
    data, indices = given
    axis = attributes.get("axis", 0)
    picked = data.index_select(axis, indices.reshape(-1).to(data.device))
    return picked.reshape([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]])


def _range(given: list[Any], _: Attributes) -> Tensor:
    start, limit, delta = (value.item() for value in given)
    return torch.arange(start, limit, delta, dtype=given[0].dtype)


def _largest(given: list[Any], attributes: Attributes) -> Tensor:
    axis, kept = attributes.get("axis", 0), bool(attributes.get("keepdims", 1))
    # Where several are the largest, ONNX means the first; on some devices torch takes any.
    highest = given[0] == given[0].amax(axis, keepdim=True)
    places = torch.arange(given[0].shape[axis], 0, -1, device=given[0].device)
    shape = [-1 if i == axis % given[0].ndim else 1 for i in range(given[0].ndim)]
    largest: Tensor = (highest * places.reshape(shape)).argmax(axis, keepdim=kept)
    return largest


def _gather_places(given: list[Any], attributes: Attributes) -> Tensor:
    if attributes.get("batch_dims", 0):
        raise BackendError("the torch backend gathers places without batch dimensions only")
    data, places = given
    found: Tensor = data[tuple(places.to(data.device).unbind(-1))]
    return found


def _linear(given: list[Any], attributes: Attributes) -> Tensor:
    a = given[0].T if attributes.get("transA", 0) else given[0]
    b = given[1].T if attributes.get("transB", 0) else given[1]
    out: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    if len(given) > 2 and given[2] is not None:
        out = out + attributes.get("beta", 1.0) * given[2]
    return out


def _convolution(given: list[Any], attributes: Attributes) -> Tensor:
    x, weight = given[:2]
    bias = given[2] if len(given) > 2 else None
    rank = weight.ndim - 2
    pads = attributes.get("pads", [0] * 2 * rank)
    if pads[:rank] != pads[rank:]:
        both = [n for i in reversed(range(rank)) for n in (pads[i], pads[rank + i])]
        x, pads = F.pad(x, both), [0] * rank
    return F.conv2d(
        x,
        weight,
        bias,
        attributes.get("strides", [1] * rank),
        pads[:rank],
        attributes.get("dilations", [1] * rank),
        attributes.get("group", 1),
    )


def _attention(given: list[Any], attributes: Attributes) -> Tensor:
    q, k, v = given[:3]
    mask = given[3] if len(given) > 3 else None
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(attributes.get("is_causal", 0)), scale=attributes.get("scale")
    )


def _resize(given: list[Any], attributes: Attributes) -> Tensor:
    if attributes.get("mode") != b"nearest":
        raise BackendError(f"the torch backend resizes to the nearest only, not {attributes}")
    return F.interpolate(given[0], scale_factor=_numbers(given[2])[2:], mode="nearest")


def _split(given: list[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    if len(given) > 1:
        return tuple(given[0].split(_ints(given[1]), dim=axis))
    return tuple(given[0].chunk(attributes["num_outputs"], dim=axis))


def _expand(given: list[Any], _: Attributes) -> Tensor:
    shape = torch.broadcast_shapes(given[0].shape, tuple(_ints(given[1])))
    expanded: Tensor = given[0].expand(shape)
    return expanded


def _layer_norm(given: list[Any], attributes: Attributes) -> Tensor:
    x, weight = given[:2]
    bias = given[2] if len(given) > 2 else None
    return F.layer_norm(x, weight.shape, weight, bias, attributes.get("epsilon", 1e-5))


def _group_norm(given: list[Any], attributes: Attributes) -> Tensor:
    x, weight, bias = given
    return F.group_norm(x, attributes["num_groups"], weight, bias, attributes.get("epsilon", 1e-5))


def _gelu(given: list[Any], attributes: Attributes) -> Tensor:
    return F.gelu(given[0], approximate=attributes.get("approximate", b"none").decode())


OPERATIONS: dict[str, Callable[[list[Any], Attributes], Any]] = {
    "Add": lambda x, _: x[0] + x[1],
    "ArgMax": _largest,
    "Attention": _attention,
    "Cast": lambda x, a: x[0].to(TORCH_DTYPES[a["to"]]),
    "Clip": lambda x, _: x[0].clamp(x[1], x[2]),
    "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
    "Conv": _convolution,
    "Cos": lambda x, _: x[0].cos(),
    "Div": _divide,
    "Equal": lambda x, _: x[0] == x[1].to(x[0].device),
    "Exp": lambda x, _: x[0].exp(),
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_places,
    "Gelu": _gelu,
    "Gemm": _linear,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda x, _: x[0] @ x[1],
    "Mul": lambda x, _: x[0] * x[1],
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Sigmoid": lambda x, _: x[0].sigmoid(),
    "Sin": lambda x, _: x[0].sin(),
    "Softmax": lambda x, a: x[0].softmax(a.get("axis", -1)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": lambda x, _: x[0] - x[1],
    "Transpose": lambda x, a: x[0].permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
}
