"""Components on PyTorch with its fused attention: for GPUs that nothing else serves.

Knows torch and onnx. The bundle's graph stays the only description of a component: its nodes run
one by one as torch operations, `Attention` as `scaled_dot_product_attention`, with the weights
taken from the same safetensors file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from sdrt.errors import BackendError
from sdrt.manifest import Component

from .protocol import Feeds, checked_feeds

Attributes = dict[str, Any]
TORCH_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


def available(device: str) -> str | None:
    """None if torch can compute on the device, else why not."""
    if device == "mps":
        return None if torch.backends.mps.is_available() else "this torch has no Metal support"
    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no GPU; install a build for CUDA or ROCm"


class TorchEngine:
    """One graph, its weights on the device. Shapes stay on the host, where the graph reads them."""

    def __init__(self, name: str, graph: Path, component: Component, device: str) -> None:
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
        self._values = _initializers(model.graph, graph.parent, self.device)
        self._nodes = [
            (OPERATIONS[n.op_type], list(n.input), list(n.output), _attributes(n))
            for n in model.graph.node
        ]
        self._last_use = _last_uses(model.graph.node, {s.name for s in self.outputs})

    @torch.inference_mode()
    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        if not self._nodes:
            raise BackendError(f"{self.name} is closed")
        ready = checked_feeds(self.name, self.inputs, feeds)
        values: dict[str, Any] = {
            name: torch.from_numpy(array).to(self.device) for name, array in ready.items()
        }
        values[""] = None
        for i, (operation, sources, targets, attributes) in enumerate(self._nodes):
            given = [values[s] if s in values else self._values[s] for s in sources]
            made = operation(given, attributes)
            made = made if isinstance(made, tuple) else (made,)
            values.update(zip(targets, made, strict=False))
            for name in self._last_use.get(i, ()):
                values.pop(name, None)
        return {spec.name: values[spec.name].cpu().numpy() for spec in self.outputs}

    def refit(self, weights: Feeds) -> None:
        """Nothing is compiled, so the tensors are put in each other's place."""
        with safe_open(self._graph.with_name("model.safetensors"), framework="pt") as file:
            for name in self._refitted - set(weights):
                self._values[name] = file.get_tensor(name).to(self.device)
        for name, array in weights.items():
            self._values[name] = torch.tensor(array, device=self.device)
        self._refitted = set(weights)

    def close(self) -> None:
        self._values.clear()
        self._nodes.clear()


def _last_uses(nodes: Sequence[Any], kept: set[str]) -> dict[int, list[str]]:
    """For each node, the values that nothing reads after it."""
    last = {name: i for i, node in enumerate(nodes) for name in node.input if name}
    ends: dict[int, list[str]] = {}
    for name, i in last.items():
        if name not in kept:
            ends.setdefault(i, []).append(name)
    return ends


def _initializers(graph: Any, folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Weights from the safetensors file to the device; small ones, mostly shapes, to the host."""
    values = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                values[tensor.name] = file.get_tensor(tensor.name).to(device)
            else:
                value = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
                values[tensor.name] = value.to(device) if value.is_floating_point() else value
    return values


def _attributes(node: Any) -> Attributes:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.reshape(-1).tolist()]


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
    return picked.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])


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
    return F.interpolate(given[0], scale_factor=given[2].tolist()[2:], mode="nearest")


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
