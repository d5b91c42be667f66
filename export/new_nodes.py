"""Nodes and inputs that are added to a graph that torch exported.

Knows the ONNX intermediate representation; not what a graph computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

Dim = int | str | ir.SymbolicDim


def get_dims(value: ir.Value) -> list[Any]:
    """The length or name of every axis."""
    return list(value.shape or ())


def add_input(graph: ir.Graph, name: str, shape: Sequence[Dim], like: ir.Value) -> ir.Value:
    """Add an input of another value's type."""
    added = ir.Value(name=name, shape=ir.Shape(shape), type=like.type)
    graph.inputs.append(added)
    return added


@dataclass
class NewNodes:
    """New nodes, to be inserted into the graph."""

    graph: ir.Graph
    pending: list[ir.Node] = field(default_factory=list)

    def take(self) -> list[ir.Node]:
        nodes, self.pending = self.pending, []
        return nodes

    def add(self, kind: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=name)
        node.outputs[0].name, node.outputs[0].type = name, inputs[0].type
        self.pending.append(node)
        return node.outputs[0]

    def split(self, value: ir.Value, axis: int, widths: Sequence[int]) -> Sequence[ir.Value]:
        sizes = self.constant(f"{value.name}_sizes", widths)
        node = ir.node("Split", [value, sizes], {"axis": axis}, num_outputs=len(widths))
        node.name = f"split_{value.name}"
        for i, (output, width) in enumerate(zip(node.outputs, widths, strict=True)):
            output.name, output.type = f"{value.name}_{i}", value.type
            output.shape = ir.Shape([*get_dims(value)[:axis], width])
        self.pending.append(node)
        return node.outputs

    def constant(self, name: str, values: Sequence[int]) -> ir.Value:
        return self._initializer(name, ir.tensor(np.array(values, np.int64), name=name))

    def scalar(self, name: str, value: float, like: ir.Value) -> ir.Value:
        assert like.dtype is not None
        return self._initializer(name, ir.tensor(value, dtype=like.dtype, name=name))

    def cast(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """The value in the type of another: a model may attend in float32."""
        if value.dtype == like.dtype:
            return value
        converted = self.add("Cast", f"{value.name}_cast", value, to=like.dtype)
        converted.type = like.type
        return converted

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.initializers[name] = value
        return value


def add_to_value(graph: ir.Graph, value: ir.Value, added: ir.Value) -> None:
    """Add one feature map to another, for all that read it.

    Where something is added to the value, such as a branch of which it is the skip connection, the
    map is added to their sum instead. Backends fuse the plain graph's additions into convolutions,
    with another rounding; they still do, so that zeros give the plain graph's output bit by bit.
    """
    pending = [value]
    while pending:
        value = pending.pop()
        readers = list(value.uses())
        sums = [node for node, _ in readers if _adds_maps(node)]
        pending += [node.outputs[0] for node in sums]
        others = [(node, index) for node, index in readers if node not in sums]
        if others or value.is_graph_output():
            total = build_sum(value, added)
            producer = value.producer()
            assert producer is not None
            graph.insert_after(producer, total)
            for node, index in others:
                node.replace_input_with(index, total.outputs[0])
            replace_output(graph, value, total.outputs[0])


def replace_output(graph: ir.Graph, value: ir.Value, other: ir.Value) -> None:
    """Let another value be an output of the graph, under its name, if the first one is."""
    if value.is_graph_output():
        place = graph.outputs.index(value)
        value.name, other.name = f"{value.name}_before", value.name
        graph.outputs[place] = other


def _adds_maps(node: ir.Node) -> bool:
    """Whether a node adds two feature maps, [B, C, H, W]."""
    return node.op_type == "Add" and all(len(v.shape or ()) == 4 for v in node.inputs if v)


def build_sum(value: ir.Value, added: ir.Value) -> ir.Node:
    """A node that adds two values."""
    total = ir.node("Add", [value, added], name=f"add_{added.name}_to_{value.name}")
    output = total.outputs[0]
    output.name, output.shape, output.type = f"{value.name}_{added.name}", value.shape, value.type
    return total
