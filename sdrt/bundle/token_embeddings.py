"""A text encoder's graph that reads the embedding of every token instead of looking it up, so that
a prompt may hold words that the vocabulary does not have.

It is derived from the encoder's `model.onnx` and lies next to it, over the same weights. A build
writes it; in bundles without it, it is written on first use. Its content is never trusted: it is
derived again and compared.

Knows the wire format of ONNX graphs, as `onnx_check` does; not what a word is.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from sdrt.atomic_files import write_atomic
from sdrt.errors import BundleError
from sdrt.json_validation import read_bytes

from .bundle import Bundle, embeddings_component
from .manifest import EMBEDDINGS_GRAPH, WEIGHTS, FileRecord, TensorSpec
from .onnx_check import (
    BYTES,
    GRAPH,
    MAX_GRAPH,
    MODEL,
    NODE,
    TENSOR,
    VALUE,
    VARINT,
    Fields,
    Message,
    parse_message,
)
from .safetensors import Tensors

TABLE = "token_embedding.weight"  # how the name of the embeddings' weight ends
ELEMENT_TYPES = {"float32": 1, "float16": 10}  # ONNX's numbers


def with_token_embeddings(bundle: Bundle, name: str) -> Bundle:
    """The bundle with a text encoder that reads token embeddings; its graph is written if need be.

    Raises:
        BundleError: The encoder's graph is not one that sdrt builds, or cannot be written.
    """
    path = bundle.graph(name).with_name(EMBEDDINGS_GRAPH)
    component = embeddings_component(bundle.manifest.components[name])
    data = write_embeddings_graph(path.parent, component.inputs[-1])
    record = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    manifest = replace(
        bundle.manifest,
        components={**bundle.manifest.components, name: component},
        files={**bundle.manifest.files, f"{name}/{EMBEDDINGS_GRAPH}": record},
    )
    return replace(bundle, manifest=manifest, graph_file=EMBEDDINGS_GRAPH)


def write_embeddings_graph(folder: Path, spec: TensorSpec) -> bytes:
    """Derive the graph of an encoder's folder, write it unless it is there, and return it.

    spec: of the input `token_embeddings`
    """
    source, path = folder / "model.onnx", folder / EMBEDDINGS_GRAPH
    try:
        data = derive_embeddings_graph(read_bytes(source, MAX_GRAPH), spec)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{source} cannot be made to read token embeddings: {error}",
            hint="build the bundle again",
        ) from error
    try:
        if not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
            write_atomic(path, data)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be written: {error}; this bundle was built without it",
            hint="use an embedding once where the folder can be written, or build the bundle again",
        ) from error
    return data


def read_table(folder: Path) -> tuple[str, np.ndarray]:
    """The name and the values [tokens, width] of an encoder's table of embeddings.

    Raises:
        BundleError: The weights hold no such table, or more than one.
    """
    weights = Tensors(folder / WEIGHTS)
    names = [name for name in weights if name.endswith(TABLE)]
    if len(names) != 1 or len(weights.shape(names[0])) != 2:
        raise BundleError(f"{folder / WEIGHTS} has {len(names)} tables of embeddings, expected 1")
    return names[0], weights[names[0]]


def derive_embeddings_graph(data: bytes, spec: TensorSpec) -> bytes:
    """A graph with an input in place of the `Gather` from the table of embeddings.

    Args:
        data: The encoder's ONNX model.
        spec: The input.

    Raises:
        ValueError: For a graph that does not look up its tokens in one place.
    """
    model = parse_message(data, MODEL, "the model")
    graph = parse_message(b"".join(_bytes(model, 7)), GRAPH, "the graph")
    nodes = [parse_message(node, NODE, "a node") for node in _bytes(graph, 1)]
    lookups = [node for node in nodes if _is_lookup(node)]
    if len(lookups) != 1 or len(_bytes(lookups[0], 2)) != 1:
        raise ValueError(f"it looks up tokens in {len(lookups)} places, expected 1")
    table, looked_up = _bytes(lookups[0], 1)[0], _bytes(lookups[0], 2)[0]
    nodes.remove(lookups[0])
    if any(table in _bytes(node, 1) for node in nodes):
        raise ValueError("it reads the table of embeddings twice")
    name = spec.name.encode()
    for node in nodes:
        node[1] = [name if value == looked_up else value for value in node.get(1, [])]
    graph[1] = [serialize_message(node) for node in nodes]
    graph[5] = [tensor for tensor in _bytes(graph, 5) if _name(tensor, TENSOR, 8) != table]
    graph[11] = [*_bytes(graph, 11), _serialize_input(spec)]
    graph[13] = [value for value in _bytes(graph, 13) if _name(value, VALUE, 1) != looked_up]
    return serialize_message({**model, 7: [serialize_message(graph)]})


def serialize_message(message: Message) -> bytes:
    """The bytes of a message whose fields are bytes and integers, in the order of its fields."""
    return b"".join(
        _serialize_field(number, value) for number in sorted(message) for value in message[number]
    )


def _is_lookup(node: Message) -> bool:
    inputs = _bytes(node, 1)
    return _bytes(node, 4) == [b"Gather"] and b"".join(inputs[:1]).endswith(TABLE.encode())


def _name(data: bytes, fields: Fields, number: int) -> bytes:
    return b"".join(_bytes(parse_message(data, fields, "a weight or value"), number))


def _bytes(message: Message, number: int) -> list[bytes]:
    return [value for value in message.get(number, ()) if isinstance(value, bytes)]


def _serialize_field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    return _varint(number << 3 | BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _serialize_input(spec: TensorSpec) -> bytes:
    axes = [
        serialize_message({2: [axis.encode()]} if isinstance(axis, str) else {1: [axis]})
        for axis in spec.shape
    ]
    shape = serialize_message({1: [*axes]})
    tensor = serialize_message({1: [ELEMENT_TYPES[spec.dtype]], 2: [shape]})
    return serialize_message({1: [spec.name.encode()], 2: [serialize_message({1: [tensor]})]})
