"""The operators of a bundle's graphs, each as torch computes it.

Knows torch and the operators' attributes; not graphs. Shapes stay on the host.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from sdrt.errors import BackendError

Attributes = dict[str, Any]

TORCH_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


def _numbers(inputs: Tensor | list[float]) -> list[float]:
    """Of a tensor, or as they are where the graph is compiled."""
    if isinstance(inputs, list):
        return inputs
    numbers: list[float] = inputs.reshape(-1).tolist()
    return numbers


def _ints(inputs: Tensor | list[float]) -> list[int]:
    return [int(value) for value in _numbers(inputs)]


def _shape(inputs: list[Any], attributes: Attributes) -> Tensor:
    shape = list(inputs[0].shape)
    return torch.tensor(shape[attributes.get("start", 0) : attributes.get("end")])


def _reshape(inputs: list[Any], _: Attributes) -> Tensor:
    shape = _ints(inputs[1])
    sizes = [inputs[0].shape[i] if size == 0 else size for i, size in enumerate(shape)]
    reshaped: Tensor = inputs[0].reshape(sizes)
    return reshaped


def _concatenate(inputs: list[Any], attributes: Attributes) -> Tensor:
    """What was computed from shapes is on the host, and moves to where the rest is."""
    device = next((v.device for v in inputs if v.device.type != "cpu"), inputs[0].device)
    return torch.cat([value.to(device) for value in inputs], dim=attributes["axis"])


def _divide(inputs: list[Any], _: Attributes) -> Tensor:
    a, b = inputs
    if a.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def _unsqueeze(inputs: list[Any], _: Attributes) -> Tensor:
    value: Tensor = inputs[0]
    for axis in sorted(_ints(inputs[1])):
        value = value.unsqueeze(axis)
    return value


def _squeeze(inputs: list[Any], _: Attributes) -> Tensor:
    value: Tensor = inputs[0]
    return value.squeeze(tuple(_ints(inputs[1]))) if len(inputs) > 1 else value.squeeze()


def _gather(inputs: list[Any], attributes: Attributes) -> Tensor:
    data, indices = inputs
    axis = attributes.get("axis", 0)
    picked = data.index_select(axis, indices.reshape(-1).to(data.device))
    return picked.reshape([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]])


def _range(inputs: list[Any], _: Attributes) -> Tensor:
    start, limit, delta = (value.item() for value in inputs)
    return torch.arange(start, limit, delta, dtype=inputs[0].dtype)


def _largest(inputs: list[Any], attributes: Attributes) -> Tensor:
    axis, keepdims = attributes.get("axis", 0), bool(attributes.get("keepdims", 1))
    # Where several are the largest, ONNX means the first; on some devices torch takes any.
    highest = inputs[0] == inputs[0].amax(axis, keepdim=True)
    places = torch.arange(inputs[0].shape[axis], 0, -1, device=inputs[0].device)
    shape = [-1 if i == axis % inputs[0].ndim else 1 for i in range(inputs[0].ndim)]
    largest: Tensor = (highest * places.reshape(shape)).argmax(axis, keepdim=keepdims)
    return largest


def _gather_places(inputs: list[Any], attributes: Attributes) -> Tensor:
    if attributes.get("batch_dims", 0):
        raise BackendError("the torch backend gathers places without batch dimensions only")
    data, places = inputs
    values: Tensor = data[tuple(places.to(data.device).unbind(-1))]
    return values


def _linear(inputs: list[Any], attributes: Attributes) -> Tensor:
    a = inputs[0].T if attributes.get("transA", 0) else inputs[0]
    b = inputs[1].T if attributes.get("transB", 0) else inputs[1]
    out: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    if len(inputs) > 2 and inputs[2] is not None:
        out = out + attributes.get("beta", 1.0) * inputs[2]
    return out


def _convolution(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, weight = inputs[:2]
    bias = inputs[2] if len(inputs) > 2 else None
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


def _attention(inputs: list[Any], attributes: Attributes) -> Tensor:
    q, k, v = inputs[:3]
    mask = inputs[3] if len(inputs) > 3 else None
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(attributes.get("is_causal", 0)), scale=attributes.get("scale")
    )


def _resize(inputs: list[Any], attributes: Attributes) -> Tensor:
    if attributes.get("mode") != b"nearest":
        raise BackendError(f"the torch backend resizes to the nearest only, not {attributes}")
    return F.interpolate(inputs[0], scale_factor=_numbers(inputs[2])[2:], mode="nearest")


def _split(inputs: list[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    if len(inputs) > 1:
        return tuple(inputs[0].split(_ints(inputs[1]), dim=axis))
    return tuple(inputs[0].chunk(attributes["num_outputs"], dim=axis))


def _expand(inputs: list[Any], _: Attributes) -> Tensor:
    shape = torch.broadcast_shapes(inputs[0].shape, tuple(_ints(inputs[1])))
    expanded: Tensor = inputs[0].expand(shape)
    return expanded


def _layer_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, weight = inputs[:2]
    bias = inputs[2] if len(inputs) > 2 else None
    return F.layer_norm(x, weight.shape, weight, bias, attributes.get("epsilon", 1e-5))


def _group_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, weight, bias = inputs
    return F.group_norm(x, attributes["num_groups"], weight, bias, attributes.get("epsilon", 1e-5))


def _gelu(inputs: list[Any], attributes: Attributes) -> Tensor:
    return F.gelu(inputs[0], approximate=attributes.get("approximate", b"none").decode())


OPERATIONS: dict[str, Callable[[list[Any], Attributes], Any]] = {
    "Add": lambda x, _: x[0] + x[1],
    "ArgMax": _largest,
    "Attention": _attention,
    "AveragePool": lambda x, a: F.avg_pool2d(x[0], a["kernel_shape"], a["strides"]),
    "Cast": lambda x, a: x[0].to(TORCH_DTYPES[a["to"]]),
    "Clip": lambda x, _: x[0].clamp(x[1], x[2]),
    "Concat": _concatenate,
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
    "LeakyRelu": lambda x, a: F.leaky_relu(x[0], a.get("alpha", 0.01)),
    "MatMul": lambda x, _: x[0] @ x[1],
    "Mul": lambda x, _: x[0] * x[1],
    "Range": _range,
    "ReduceMean": lambda x, a: x[0].mean(_ints(x[1]), keepdim=bool(a.get("keepdims", 1))),
    "Relu": lambda x, _: x[0].relu(),
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
