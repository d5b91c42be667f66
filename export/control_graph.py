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
from .new_nodes import add_input, add_to_value, build_sum, get_dims
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
        value = mid if place is None else skips[place]
        assert value is not None
        add_to_value(graph, value, _input_like(graph, value, f"{ADAPTER_STATE}_{i}"))
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
    total = build_sum(value, _input_like(graph, value, name))
    graph.insert_before(node, total)
    node.replace_input_with(index, total.outputs[0])


def _input_like(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """A new input of the graph, of a value's shape and type."""
    return add_input(graph, name, get_dims(value), value)
