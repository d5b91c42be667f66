"""The UNet's graph without the work that no step changes, and the graphs of that work, over the
same stored weights: keys and values of cross-attention, which depend on the prompt alone, and the
biases of residual blocks, which depend on the timestep and added conditions alone.

Knows which products of a graph that torch exported depend on which inputs; not how often a runtime
needs them.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sdrt.bundle.manifest import Component
from sdrt.export.graph import graph_specs

HOISTED_GRAPH, CONTEXT_GRAPH, TIME_GRAPH = "hoisted.onnx", "context.onnx", "time.onnx"
CONTEXT_KV, TIME_BIASES = "context_kv", "time_biases"
CONTEXT = ("context",)
TIME = ("timestep", "pooled", "time_ids", "timestep_cond")
PRODUCTS = ("Gemm", "MatMul")


def write_hoisted_graphs(folder: Path, dtype: str) -> dict[str, Component]:
    """Write three graphs next to a UNet's plain one.

    `context_kv` [rows, tokens, 2 * channels of all layers] has the keys and the values of every
    cross-attention layer, `time_biases` [rows, channels of all blocks] what every residual block
    adds; both in the order of the graph. They are outputs of two graphs and inputs of the third.

    Returns:
        The graphs as components by file, not validated; none for a UNet without cross-attention.
    """
    path = folder / "model.onnx"
    hoisted, context, time = (ir.load(path) for _ in range(3))
    if not any(value.name in CONTEXT for value in hoisted.graph.inputs):
        return {}
    _read_from_input(hoisted.graph, CONTEXT, CONTEXT_KV)
    _read_from_input(hoisted.graph, TIME, TIME_BIASES)
    _output_alone(context.graph, CONTEXT, CONTEXT_KV)
    _output_alone(time.graph, TIME, TIME_BIASES)
    components = {}
    for file, model in ((HOISTED_GRAPH, hoisted), (CONTEXT_GRAPH, context), (TIME_GRAPH, time)):
        RemoveUnusedNodesPass()(model)
        ir.save(model, folder / file)
        specs = graph_specs(model.graph.inputs), graph_specs(model.graph.outputs)
        components[file] = Component(*specs, dtype, {}, _stored_weights(model.graph))
    return components


def _stored_weights(graph: ir.Graph) -> tuple[str, ...]:
    values = graph.initializers.values()
    stored = (v.name for v in values if isinstance(v.const_value, ir.ExternalTensor))
    return tuple(sorted(str(name) for name in stored))


def _read_from_input(graph: ir.Graph, names: Collection[str], name: str) -> None:
    """Read the last products of what depends on these inputs alone from one input instead."""
    products = _last_products(graph, names)
    widths = [_width(value) for value in products]
    like = products[0]
    packed = ir.Value(name=name, shape=_packed_shape(like, widths), type=like.type)
    sizes = _constant(graph, f"{name}_sizes", widths)
    split = ir.node("Split", [packed, sizes], {"axis": -1}, num_outputs=len(widths))
    split.name = f"split_{name}"
    for i, (output, value) in enumerate(zip(split.outputs, products, strict=True)):
        output.name, output.shape, output.type = f"{name}_{i}", value.shape, value.type
        value.replace_all_uses_with(output)
    for value in [value for value in graph.inputs if value.name in names]:
        for node, index in list(value.uses()):
            if node.op_type == "Shape":  # of rows and tokens, which the packed input has too
                node.replace_input_with(index, packed)
        graph.inputs.remove(value)
    graph.inputs.append(packed)
    graph.insert_before(graph[0], split)


def _output_alone(graph: ir.Graph, names: Collection[str], name: str) -> None:
    """Let the last products of what depends on these inputs be the graph's one output."""
    products = _last_products(graph, names)
    node = ir.node("Concat", products, {"axis": -1}, name=f"concat_{name}")
    packed = node.outputs[0]
    packed.name, packed.type = name, products[0].type
    packed.shape = _packed_shape(products[0], [_width(value) for value in products])
    graph.append(node)
    graph.outputs.clear()
    graph.outputs.append(packed)
    for value in [value for value in graph.inputs if value.name not in names]:
        graph.inputs.remove(value)


def _last_products(graph: ir.Graph, names: Collection[str]) -> list[ir.Value]:
    """Products that depend on these inputs alone and that no other such product reads."""
    invariant = {value for value in graph.inputs if value.name in names}
    constant = set(graph.initializers.values())
    products: dict[ir.Value, set[ir.Value]] = {}  # with the products that each value is made of
    sources: dict[ir.Value, set[ir.Value]] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if not all(value in invariant or value in constant for value in inputs):
            continue
        is_constant = all(value in constant for value in inputs)
        (constant if is_constant else invariant).update(node.outputs)
        reads = set().union(*(sources.get(value, set()) for value in inputs))
        if node.op_type in PRODUCTS and not is_constant:
            products[node.outputs[0]] = reads
            reads = {node.outputs[0]}
        sources.update(dict.fromkeys(node.outputs, reads))
    read = set().union(*products.values())
    return [value for value in products if value not in read]


def _width(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[-1])  # type: ignore[arg-type]


def _packed_shape(like: ir.Value, widths: Sequence[int]) -> ir.Shape:
    return ir.Shape([*list(like.shape or ())[:-1], sum(widths)])


def _constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    tensor = ir.tensor(np.array(values, np.int64), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.initializers[name] = value
    return value
