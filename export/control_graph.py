"""The UNet's graph with residuals of a ControlNet and a T2I-Adapter, and keys and values of an
IP-Adapter, as inputs, over the same stored weights. It is derived from the plain graph: another
export would double the time of a build.

Knows where a U-Net's skips and cross-attention layers are in a graph that torch exported; not what
makes the inputs.
"""

from pathlib import Path

import onnx_ir as ir

from sdrt.bundle.manifest import (
    ADAPTER_STATE,
    CONTROL_GRAPH,
    DOWN_RESIDUAL,
    MID_RESIDUAL,
    Component,
)

from .graph import graph_specs
from .image_attention import add_image_attention
from .unet_config import UnetConfig


def write_control_graph(folder: Path, config: UnetConfig, dtype: str) -> Component:
    """Write the graph of a UNet with residual inputs next to the plain one.

    On the way up each skip is the second input of a concatenation, the last skip first. A
    ControlNet's residual is added there alone, a T2I-Adapter's map wherever the skip is read.

    Returns:
        The graph as a component, not validated.
    """
    model = ir.load(folder / "model.onnx")
    graph = model.graph
    ups = [node for node in graph if _joins_channels(node)]
    skips = [node.inputs[1] for node in reversed(ups)]
    mid = ups[0].inputs[0]
    assert len(skips) == len(config.skip_shapes(8, 8)) and mid is not None
    for i, node in enumerate(reversed(ups)):
        _add_to_input(graph, node, 1, f"{DOWN_RESIDUAL}_{i}")
    _add_to_input(graph, ups[0], 0, MID_RESIDUAL)
    for i, place in enumerate(config.adapter_places):
        _add_to_value(graph, mid if place is None else skips[place], f"{ADAPTER_STATE}_{i}")
    add_image_attention(graph, config)
    ir.save(model, folder / CONTROL_GRAPH)
    return Component(graph_specs(graph.inputs), graph_specs(graph.outputs), dtype, {})


def _joins_channels(node: ir.Node) -> bool:
    """Whether a node joins feature maps, [B, C, H, W], along their channels."""
    rank = len(node.outputs[0].shape or ())
    return node.op_type == "Concat" and rank == 4 and node.attributes["axis"].as_int() == 1


def _add_to_input(graph: ir.Graph, node: ir.Node, index: int, name: str) -> None:
    """Add a new input of the graph to one of a node's."""
    value = node.inputs[index]
    assert value is not None
    total = _sum_with_input(graph, value, name)
    graph.insert_before(node, total)
    node.replace_input_with(index, total.outputs[0])


def _add_to_value(graph: ir.Graph, value: ir.Value | None, name: str) -> None:
    """Add a new input of the graph to a value, for all that read it.

    Where something is added to the value, such as a branch of which it is the skip connection, the
    input is added to their sum instead. Backends fuse the plain graph's additions into
    convolutions, with another rounding; they still do, so that zeros give the plain graph's output
    bit by bit.
    """
    assert value is not None
    pending, total = [value], None
    while pending:
        value = pending.pop()
        readers = list(value.uses())
        sums = [node for node, _ in readers if _adds_maps(node)]
        pending += [node.outputs[0] for node in sums]
        others = [(node, index) for node, index in readers if node not in sums]
        if others:
            added = total.inputs[1] if total else None
            total = _sum_with_input(graph, value, name, added)
            producer = value.producer()
            assert producer is not None
            graph.insert_after(producer, total)
            for node, index in others:
                node.replace_input_with(index, total.outputs[0])


def _adds_maps(node: ir.Node) -> bool:
    """Whether a node adds two feature maps, [B, C, H, W]."""
    return node.op_type == "Add" and all(len(v.shape or ()) == 4 for v in node.inputs if v)


def _sum_with_input(
    graph: ir.Graph, value: ir.Value, name: str, added: ir.Value | None = None
) -> ir.Node:
    """A node that adds an input of the graph, which is a new one unless it is passed."""
    if added is None:
        added = ir.Value(name=name, shape=value.shape, type=value.type)
        graph.inputs.append(added)
    total = ir.node("Add", [value, added], name=f"add_{name}_to_{value.name}")
    output = total.outputs[0]
    output.name, output.shape, output.type = f"{value.name}_{name}", value.shape, value.type
    return total
