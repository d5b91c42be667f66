"""Untrusted ONNX graphs, validated before any engine parses them.

Knows the wire format of protocol buffers and those fields of ONNX that this project's own exporter
writes; everything else is refused, so that what is not known here is not parsed there: subgraphs,
functions, custom operators, training, weights in other files. Nothing recurses. The field numbers
are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

import math
from collections.abc import Mapping
from pathlib import Path

from sdrt.errors import BundleError
from sdrt.json_validation import read_bytes, shorten

from .manifest import Component
from .safetensors import Header, read_header

MAX_GRAPH = 64_000_000  # bytes; a full-size UNet's has 330,000
OPSETS = range(18, 24)
VARINT, WIDE, BYTES, NARROW = 0, 1, 2, 5  # wire types; groups, 3 and 4, are gone from ONNX
EXTERNAL = 1
# ONNX's number of a type, the safetensors file's name of it, bytes of an element
TYPES = {
    1: ("F32", 4),
    6: ("I32", 4),
    7: ("I64", 8),
    9: ("BOOL", 1),
    10: ("F16", 2),
    16: ("BF16", 2),
}
OPERATORS = {
    *("Add", "ArgMax", "Attention", "Cast", "Clip", "Concat", "Conv", "Cos", "Div", "Equal", "Exp"),
    *("Expand", "Gather", "GatherND", "Gelu", "Gemm", "GroupNormalization", "LayerNormalization"),
    *("MatMul", "Mul", "Range", "ReduceL2", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Sin"),
    *("Softmax", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze"),
    *("AveragePool", "LeakyRelu", "ReduceMean"),
}
# For each message its fields: the wire type, and whether the field may come more than once.
Fields = Mapping[int, tuple[int, bool]]
ONE, MANY = (BYTES, False), (BYTES, True)
NUMBER = (VARINT, False)
MODEL: Fields = {
    **{1: NUMBER, 2: ONE, 3: ONE, 4: ONE, 5: NUMBER, 6: ONE, 7: ONE, 8: MANY, 14: MANY},
}
OPSET: Fields = {1: ONE, 2: NUMBER}
GRAPH: Fields = {1: MANY, 2: ONE, 5: MANY, 10: ONE, 11: MANY, 12: MANY, 13: MANY, 16: MANY}
NODE: Fields = {1: MANY, 2: MANY, 3: ONE, 4: ONE, 5: MANY, 6: ONE, 7: ONE, 9: MANY}
ATTRIBUTE: Fields = {
    **{1: ONE, 2: (NARROW, False), 3: NUMBER, 4: ONE, 13: ONE, 20: NUMBER},
    **{7: (NARROW, True), 8: (VARINT, True)},
}
TENSOR: Fields = {
    **{1: (VARINT, True), 2: NUMBER, 8: ONE, 9: ONE, 12: ONE, 13: MANY, 14: NUMBER, 16: MANY},
}
ENTRY: Fields = {1: ONE, 2: ONE}
VALUE: Fields = {1: ONE, 2: ONE, 3: ONE, 4: MANY}
TYPE: Fields = {1: ONE, 6: ONE}  # of tensors only
ARRAY: Fields = {1: NUMBER, 2: ONE}
SHAPE: Fields = {1: MANY}
AXIS: Fields = {1: NUMBER, 2: ONE, 3: ONE}
Message = dict[int, list[int | bytes]]


def check_graph(path: Path, component: Component) -> None:
    """Raise BundleError unless the graph is one that the exporter could have written, with the
    manifest's inputs and outputs, and all its weights in `model.safetensors` next to it: each the
    tensor of its own name, at that tensor's place, of its type and shape.
    """
    header = read_header(path.with_name("model.safetensors"), BundleError)
    try:
        names = _check_model(_graph_bytes(path), header)
        for actual, specs in zip(names, (component.inputs, component.outputs), strict=True):
            if actual != (expected := [spec.name for spec in specs]):
                raise ValueError(f"it has {shorten(actual)}, the manifest {shorten(expected)}")
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} is no graph that sdrt builds: {error}; build the bundle from its checkpoint"
        ) from error


def _check_model(data: bytes, header: Header) -> tuple[list[str], list[str]]:
    """Names of the graph's inputs and outputs; raises ValueError for what is refused."""
    model = parse_message(data, MODEL, "the model")
    _check_opsets([parse_message(item, OPSET, "an opset") for item in _bytes(model, 8)])
    (graph,) = [parse_message(item, GRAPH, "the graph") for item in _bytes(model, 7)] or [{}]
    _check_notes(model, 14)
    _check_notes(graph, 16)
    for node in _bytes(graph, 1):
        _check_node(parse_message(node, NODE, "a node"))
    known: set[str] = set()
    for tensor in _bytes(graph, 5):
        name = _check_tensor(parse_message(tensor, TENSOR, "a weight"), header)
        if name in known:
            raise ValueError(f"the weight {shorten(name)} comes twice")
        known.add(name)
    for value in _bytes(graph, 13):
        _value_name(value)
    inputs, outputs = ([_value_name(value) for value in _bytes(graph, n)] for n in (11, 12))
    return inputs, outputs


def _check_opsets(opsets: list[Message]) -> None:
    actual = [(_text(opset, 1), _int(opset, 2)) for opset in opsets]
    if len(actual) != 1 or actual[0][0] or actual[0][1] not in OPSETS:
        raise ValueError(
            f"its operators are of {shorten(actual)}; expected ONNX's own, "
            f"opset {OPSETS[0]} to {OPSETS[-1]}"
        )


def _check_node(node: Message) -> None:
    domain, kind = _text(node, 7), _text(node, 4)
    if domain or kind not in OPERATORS:
        raise ValueError(f"its operator {shorten(f'{domain}::{kind}')} is none that sdrt uses")
    for attribute in _bytes(node, 5):
        parse_message(attribute, ATTRIBUTE, f"an attribute of {kind}")
    _check_notes(node, 9)


def _check_notes(fields: Message, number: int) -> None:
    """Text that nobody reads."""
    for note in _bytes(fields, number):
        parse_message(note, ENTRY, "a note")


def _value_name(value: bytes) -> str:
    fields = parse_message(value, VALUE, "a value")
    types = [parse_message(item, TYPE, "a type") for item in _bytes(fields, 2)]
    tensors = [parse_message(item, ARRAY, "a type") for kind in types for item in _bytes(kind, 1)]
    shapes = [parse_message(item, SHAPE, "a shape") for kind in tensors for item in _bytes(kind, 2)]
    for axis in (axis for shape in shapes for axis in _bytes(shape, 1)):
        parse_message(axis, AXIS, "an axis")
    _check_notes(fields, 4)
    return _text(fields, 1)


def _check_tensor(tensor: Message, header: Header) -> str:
    name = _text(tensor, 8)
    shape = tuple(_length(length) for length in tensor.get(1, ()))
    kind, width = TYPES.get(_int(tensor, 2), ("", 0))
    _check_notes(tensor, 16)
    if not width:
        raise ValueError(f"the weight {shorten(name)} is of type {_int(tensor, 2)}")
    if _int(tensor, 14) == EXTERNAL:
        _check_place(name, (kind, shape), tensor, header)
    elif (length := len(_bytes(tensor, 9)[0] if 9 in tensor else b"")) != math.prod(shape) * width:
        raise ValueError(f"the weight {shorten(name)} has {length} bytes, not those of {shape}")
    elif 13 in tensor or _int(tensor, 14):
        raise ValueError(f"the weight {shorten(name)} is here and elsewhere")
    return name


def _check_place(
    name: str, said: tuple[str, tuple[int, ...]], tensor: Message, header: Header
) -> None:
    entries = [parse_message(item, ENTRY, "a place") for item in _bytes(tensor, 13)]
    places = {_text(entry, 1): _text(entry, 2) for entry in entries}
    record = header.records.get(name)
    if record is None or said != (record.dtype, record.shape) or 9 in tensor:
        raise ValueError(
            f"the weight {shorten(name)} is {said[0]} {list(said[1])}; model.safetensors has "
            f"{record and (record.dtype, list(record.shape))}"
        )
    low, high = record.data_offsets
    expected = {
        "location": "model.safetensors",
        "offset": str(header.start + low),
        "length": str(high - low),
    }
    for key in sorted(places.keys() | expected.keys()):
        if places.get(key) != expected.get(key):
            raise ValueError(
                f"the weight {shorten(name)} has {shorten(key)} "
                f"{shorten(places.get(key))}, expected {expected.get(key)!r}"
            )
    if len(entries) != len(expected):
        raise ValueError(f"the weight {shorten(name)} says twice where it lies")


Shape = tuple[str | int, ...]


def _graph_bytes(path: Path) -> bytes:
    """A graph's file; raises ValueError where it is larger than any graph that sdrt builds."""
    return read_bytes(path, MAX_GRAPH)


def graph_values(path: Path) -> tuple[list[tuple[str, list[str]]], dict[str, Shape]]:
    """A graph's nodes, each its operator and the names of its inputs, and every value's shape: a
    number or a name for each axis. Raises BundleError for a file that is no graph.
    """
    try:
        model = parse_message(_graph_bytes(path), MODEL, "the model")
        graph = parse_message(_bytes(model, 7)[0], GRAPH, "the graph")
        nodes = [parse_message(item, NODE, "a node") for item in _bytes(graph, 1)]
        values = [
            parse_message(item, VALUE, "a value") for n in (11, 12, 13) for item in _bytes(graph, n)
        ]
        named = {_text(value, 1): _shape(value) for value in values}
    except (OSError, ValueError, IndexError) as error:
        raise BundleError(f"{path} is no graph that sdrt builds: {error}") from error
    return [(_text(n, 4), [name.decode() for name in _bytes(n, 1)]) for n in nodes], named


def _shape(value: Message) -> Shape:
    inside = [value]
    for field, fields in ((2, TYPE), (1, ARRAY), (2, SHAPE)):
        inside = [
            parse_message(item, fields, "a shape") for one in inside for item in _bytes(one, field)
        ]
    axes = [parse_message(item, AXIS, "an axis") for one in inside for item in _bytes(one, 1)]
    return tuple(_text(axis, 2) or _int(axis, 1) for axis in axes)


def parse_message(data: bytes, known: Fields, what: str) -> Message:
    """The fields of one message, those that it holds not looked into; raises ValueError for a field
    that is not known, of another wire type, or there twice where one is wanted.
    """
    actual: Message = {}
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        expected = known.get(field)
        if expected is None:
            raise ValueError(f"field {field} of {what} is not known here")
        if wire == BYTES:
            length, at = _varint(data, at)
            value: int | bytes = data[at : at + length]
            at += length
        elif wire == VARINT:
            value, at = _varint(data, at)
        else:
            value, at = 0, at + (8 if wire == WIDE else 4)
        if at > end:
            raise ValueError(f"{what} ends too soon")
        if wire == expected[0]:
            actual.setdefault(field, []).append(value)
        elif wire == BYTES and expected[0] in (VARINT, NARROW) and expected[1]:
            actual.setdefault(field, []).extend(_packed(bytes(value), expected[0], what))
        else:
            raise ValueError(f"field {field} of {what} is of wire type {wire}")
        if not expected[1] and len(actual[field]) > 1:
            raise ValueError(f"field {field} of {what} comes twice")
    return actual


def _packed(data: bytes, wire: int, what: str) -> list[int | bytes]:
    """Numbers written one after another."""
    if wire == NARROW:
        if len(data) % 4:
            raise ValueError(f"{what} ends too soon")
        return [0] * (len(data) // 4)
    values: list[int | bytes] = []
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first, at most 64; and where the next field begins."""
    value = shift = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, at + i + 1
        shift += 7
    raise ValueError("a number that does not end")


def _bytes(fields: Message, number: int) -> list[bytes]:
    return [value for value in fields.get(number, ()) if isinstance(value, bytes)]


def _text(fields: Message, number: int) -> str:
    """Empty if it is not there."""
    return b"".join(_bytes(fields, number)).decode("utf-8")


def _length(value: int | bytes) -> int:
    """A length; negative ones are written as numbers of 64 bits."""
    if not isinstance(value, int) or value >= 2**63:
        raise ValueError("a weight has a negative side")
    return value


def _int(fields: Message, number: int) -> int:
    """0 if it is not there."""
    value = fields.get(number, [0])[0]
    return value if isinstance(value, int) else 0
