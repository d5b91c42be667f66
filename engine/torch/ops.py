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
