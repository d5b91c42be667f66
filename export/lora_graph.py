"""Graphs in which every row has LoRA factors of its own, as an input, over the same stored weights.

A layer's output becomes `W x + b + up (down x)` (Hu et al. 2021, arXiv:2106.09685), with `up` and
`down` per row of the batch, so that one call serves images with different LoRA files. Knows where
the layers are in a graph that torch exported; not what the factors are (`sdrt.runtime.lora.rows`).
"""

from pathlib import Path

import onnx_ir as ir

from sdrt.bundle.manifest import LORA_FACTORS, LORA_GRAPH, Component

from .graph import graph_specs
from .new_nodes import NewNodes, add_input, add_to_value, build_sum, get_dims, replace_output

PLACES = (".attentions.", ".layers.")  # in names of weights: of UNets, of text encoders


def write_lora_graph(folder: Path, rank: int, dtype: str) -> Component | None:
    """Write the graph of a component with an input `lora` [rows, P] next to the plain one.

    P holds, for every linear layer and every convolution of 1x1 of the attention blocks in the
    graph's order, `down` [in, rank] and then `up` [rank, out].

    Returns:
        The graph as a component, not validated, whose `weights` name the layers in their order.
        None where the network has no such layer.
    """
    model = ir.load(folder / "model.onnx")
    graph = model.graph
    layers = [node for node in graph if _is_target(node)]
    if not layers:
        return None
    nodes, sizes = NewNodes(graph), []
    for node in layers:
        inside, out = _widths(node)
        sizes += [inside * rank, rank * out]
    rows, weight = get_dims(graph.inputs[0])[0], _value(node, 1)
    factors = nodes.split(add_input(graph, LORA_FACTORS, [rows, sum(sizes)], weight), 1, sizes)
    graph.insert_before(graph[0], nodes.take())
    for i, node in enumerate(layers):
        add = _add_to_linear if node.op_type == "MatMul" else _add_to_convolution
        add(nodes, node, factors[2 * i], factors[2 * i + 1], rank)
    ir.save(model, folder / LORA_GRAPH)
    names = tuple(str(_value(node, 1).name) for node in layers)
    specs = graph_specs(graph.inputs), graph_specs(graph.outputs)
    return Component(*specs, dtype, {}, names)


def _value(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _is_target(node: ir.Node) -> bool:
    """Whether a node is a layer with factors."""
    if node.op_type not in ("MatMul", "Conv"):
        return False
    weight = _value(node, 1)
    if not weight.is_initializer() or not any(place in str(weight.name) for place in PLACES):
        return False
    return node.op_type == "MatMul" or get_dims(weight)[2:] == [1, 1]


def _widths(node: ir.Node) -> tuple[int, int]:
    """Of a layer's inputs and outputs. A linear layer's weight is stored as [in, out]."""
    first, second, *_ = get_dims(_value(node, 1))
    return (first, second) if node.op_type == "MatMul" else (second, first)


def _add_to_linear(nodes: NewNodes, node: ir.Node, down: ir.Value, up: ir.Value, rank: int) -> None:
    """Add `up (down x)` to a linear layer of [rows, positions, in], after its bias: up to there
    backends fuse the layer as they do in the plain graph.
    """
    x, (inside, out) = _value(node, 0), _widths(node)
    first, second = _matrix(nodes, down, inside, rank, x), _matrix(nodes, up, rank, out, x)
    reduced = nodes.add("MatMul", f"{down.name}_product", x, first)
    own = nodes.add("MatMul", f"{up.name}_product", reduced, second)
    end = _find_end(node)
    readers, total = list(end.outputs[0].uses()), build_sum(end.outputs[0], own)
    nodes.graph.insert_after(end, [*nodes.take(), total])
    for reader, index in readers:
        reader.replace_input_with(index, total.outputs[0])
    replace_output(nodes.graph, end.outputs[0], total.outputs[0])


def _add_to_convolution(
    nodes: NewNodes, node: ir.Node, down: ir.Value, up: ir.Value, rank: int
) -> None:
    """Add `up (down x)` to a convolution of [rows, in, height, width]."""
    x, (inside, out) = _value(node, 0), _widths(node)
    first, second = (
        nodes.add("Transpose", f"{value.name}_turned", value, perm=[0, 2, 1])
        for value in (_matrix(nodes, down, inside, rank, x), _matrix(nodes, up, rank, out, x))
    )
    flat = _matrix(nodes, x, inside, -1, x)
    reduced = nodes.add("MatMul", f"{down.name}_product", first, flat)
    product = nodes.add("MatMul", f"{up.name}_product", second, reduced)
    shape = ir.node("Shape", [x], name=f"{up.name}_sides")
    sides = shape.outputs[0]
    sides.name, sides.type = shape.name, ir.TensorType(ir.DataType.INT64)
    turned = ir.node("Reshape", [product, sides], name=f"{up.name}_map")
    own = turned.outputs[0]
    own.name, own.type = turned.name, x.type
    add_to_value(nodes.graph, node.outputs[0], own)
    if inside != out:  # another reader of the output would keep backends from fusing it
        shape.replace_input_with(0, node.outputs[0])
    nodes.graph.insert_after(node, [*nodes.take(), shape, turned])


def _matrix(nodes: NewNodes, value: ir.Value, height: int, width: int, like: ir.Value) -> ir.Value:
    """Every row of a value as a matrix, in the type of another."""
    shape = nodes.constant(f"{value.name}_matrix_shape", [0, height, width])
    return nodes.cast(nodes.add("Reshape", f"{value.name}_matrix", value, shape), like)


def _find_end(node: ir.Node) -> ir.Node:
    """The node that adds a layer's bias; the layer itself where it has none."""
    readers = list(node.outputs[0].uses())
    if len(readers) == 1 and readers[0][0].op_type == "Add":
        ((following, _),) = readers
        if any(value and value.is_initializer() for value in following.inputs):
            return following
    return node
