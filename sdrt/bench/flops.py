"""How much arithmetic a bundle's graph is, counted from its ONNX file.

Knows the file's encoding and the few operators that do the work; needs no package that reads ONNX,
as a runtime has none. The sizes of all tensors stand in the file, as arithmetic over named axes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdrt.engine.axes import evaluate_axis

Shape = tuple[int, ...]
Axes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Node:
    """One operator, by the names of its tensors."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def flops(graph: Path, axes: Axes) -> int:
    """Floating-point operations of one call, a multiplication and an addition each counted:
    those of convolutions, products of matrices and attention.

    axes: a length for every named axis of the graph's inputs, such as rows or latent_height
    """
    nodes, shapes = _read(graph.read_bytes(), axes)
    return sum(_node_flops(node, shapes) for node in nodes)


def _node_flops(node: Node, shapes: Mapping[str, Shape]) -> int:
    if node.kind == "Conv":
        weight = shapes[node.inputs[1]]  # [out, in / groups, height, width]
        return 2 * math.prod(shapes[node.outputs[0]]) * math.prod(weight[1:])
    if node.kind == "MatMul":
        return 2 * math.prod(shapes[node.outputs[0]]) * shapes[node.inputs[0]][-1]
    if node.kind == "Gemm":
        weight = shapes[node.inputs[1]]
        return 2 * shapes[node.outputs[0]][0] * math.prod(weight)
    if node.kind == "Attention":  # [rows, heads, length, width], every one of the three
        query, key, value = (shapes[name] for name in node.inputs[:3])
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _read(model: bytes, axes: Axes) -> tuple[list[Node], dict[str, Shape]]:
    """The nodes of an ONNX file and the shape of every tensor that has one."""
    nodes: list[Node] = []
    shapes: dict[str, Shape] = {}
    graph = next(value for number, value in _fields(model) if number == 7)  # ModelProto.graph
    for number, value in _fields(graph):
        if number == 1:  # node
            nodes.append(_node(value))
        elif number == 5:  # initializer
            parts = list(_fields(value))
            name = next(part for field, part in parts if field == 8).decode()
            shapes[name] = tuple(_dims(part for field, part in parts if field == 1))
        elif number in (11, 12, 13):  # input, output, value_info
            name, shape = _value_info(value, axes)
            if shape is not None:
                shapes[name] = shape
    return nodes, shapes


def _node(message: bytes) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: []}  # input, output, op_type
    for number, value in _fields(message):
        if number in texts:
            texts[number].append(value.decode())
    return Node(texts[4][0], tuple(texts[1]), tuple(texts[2]))


def _dims(parts: Iterator[bytes]) -> Iterator[int]:
    """TensorProto.dims: numbers one by one, which `_fields` gives as their bytes."""
    return (int.from_bytes(part, "little") for part in parts)


def _value_info(message: bytes, axes: Axes) -> tuple[str, Shape | None]:
    """ValueInfoProto: name, and type.tensor_type.shape.dim where there is one."""
    name, shape = "", None
    for number, value in _fields(message):
        if number == 1:
            name = value.decode()
        elif number == 2:
            tensor = dict(_fields(value)).get(1, b"")
            dims = dict(_fields(tensor)).get(2)
            if dims is not None:
                shape = tuple(_dim(dim, axes) for number, dim in _fields(dims) if number == 1)
    return name, shape


def _dim(message: bytes, axes: Axes) -> int:
    """A length, written as a number (1) or as arithmetic over names (2); 0 where it is neither."""
    parts = dict(_fields(message))
    if 1 in parts:
        return int.from_bytes(parts[1], "little")
    text = parts.get(2, b"0").decode()
    return evaluate_axis(text, axes)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Every field's number and value in protobuf's encoding; a number's bytes are little-endian."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            number, at = _varint(message, at)
            yield tag >> 3, number.to_bytes(10, "little")
            continue
        if wire == 2:
            length, at = _varint(message, at)
        else:
            length = {1: 8, 5: 4}[wire]
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a byte, and where the next thing begins."""
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
