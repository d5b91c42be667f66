"""The UNet's graph with token merging, over the same stored weights: Bolya and Hoffman 2023
(arXiv:2303.17604), as published but for the destination of a cell of 2x2 tokens, which is its first
and not a random one, so that the graph stays a function.

Knows where self-attention is in a graph that torch exported; not what merging saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sdrt.bundle.manifest import Component
from sdrt.export.graph import graph_specs
from sdrt.export.new_nodes import NewNodes, get_dims

MAX_RATIO = 0.75  # the destinations are the others
MERGED = "merged_tokens"
INTEGER = ir.TensorType(ir.DataType.INT64)
BOOLEAN = ir.TensorType(ir.DataType.BOOL)


def write_merged_graph(folder: Path, file: str, ratio: float, dtype: str) -> Component:
    """Write the graph that merges a fraction of the tokens before self-attention at the highest
    resolution, and unmerges them after it, next to a UNet's plain one.

    The sides of the latents must be even. Layers of the highest resolution are the narrowest.

    Returns:
        The graph as a component, not validated.
    """
    assert 0.0 < ratio <= MAX_RATIO
    model = ir.load(folder / "model.onnx")
    graph = model.graph
    layers = [node for node in graph if node.op_type == "Attention" and _attends_to_itself(node)]
    narrowest = min(_width(node) for node in layers)
    sample = next(value for value in graph.inputs if value.name == "sample")
    nodes = Nodes(graph)
    cells = _number_tokens(nodes, sample, ratio)
    graph.insert_before(graph[0], nodes.take())
    for i, node in enumerate(node for node in layers if _width(node) == narrowest):
        _merge_around(nodes, SelfAttention.of(node), cells, f"merging_{i}")
    RemoveUnusedNodesPass()(model)
    ir.save(model, folder / file)
    return Component(graph_specs(graph.inputs), graph_specs(graph.outputs), dtype, {})


class Nodes(NewNodes):
    """New nodes, some of whose outputs are integers."""

    def integers(self, kind: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        value = self.add(kind, name, *inputs, **attributes)
        value.type = INTEGER
        return value

    def count_up(self, name: str, end: ir.Value) -> ir.Value:
        """The integers from 0 to before `end` [1]."""
        zero, one = (self.scalar(f"{name}_{i}", i, end) for i in range(2))
        axis = self.constant(f"{name}_axis", [0])
        return self.integers(
            "Range", name, zero, self.add("Squeeze", f"{name}_end", end, axis), one
        )

    def slice(
        self, name: str, value: ir.Value, start: ir.Value, end: ir.Value, axis: int
    ) -> ir.Value:
        return self.add("Slice", name, value, start, end, self.constant(f"{name}_axis", [axis]))

    def rank(self, name: str, value: ir.Value, count: ir.Value) -> ir.Value:
        """Positions [B, count] along the second axis, of the largest first."""
        node = ir.node("TopK", [value, count], {"axis": 1}, num_outputs=2, name=name)
        values, indices = node.outputs
        values.name, values.type = f"{name}_values", value.type
        indices.name, indices.type = name, INTEGER
        self.pending.append(node)
        return indices

    def gather_tokens(self, name: str, tokens: ir.Value, indices: ir.Value) -> ir.Value:
        """Of tokens [B, N, C] those at indices [B, M], [B, M, C]."""
        last = self.constant(f"{name}_last", [-1])
        at = self.add("Unsqueeze", f"{name}_at", indices, last)
        return self.add("GatherND", name, tokens, at, batch_dims=1)


@dataclass(frozen=True, slots=True)
class Cells:
    """How tokens are numbered: destinations, then sources. Counts are [1], others one-dimensional.

    sources, destinations: their positions in the image
    places: of every position of the image, its number
    merged, unmerged, num_sources, num_destinations: counts
    by_destination, by_unmerged: the integers from 0 to before their counts
    """

    sources: ir.Value
    destinations: ir.Value
    places: ir.Value
    merged: ir.Value
    unmerged: ir.Value
    num_sources: ir.Value
    num_destinations: ir.Value
    by_destination: ir.Value
    by_unmerged: ir.Value


def _number_tokens(nodes: Nodes, sample: ir.Value, ratio: float) -> Cells:
    """The same for all layers."""
    height, width = (
        nodes.integers("Shape", f"merging_side_{axis}", sample, start=axis, end=axis + 1)
        for axis in (2, 3)
    )
    two, flat = nodes.constant("merging_two", [2]), nodes.constant("merging_flat", [-1])
    zero, four = nodes.constant("merging_zero", [0]), nodes.constant("merging_four", [4])
    rows, columns = (nodes.add("Div", f"{side.name}_half", side, two) for side in (height, width))
    count = nodes.add("Mul", "merging_tokens", height, width)
    numbers = nodes.count_up("merging_numbers", count)

    def transposed(name: str, sides: Sequence[ir.Value], perm: list[int]) -> ir.Value:
        shape = nodes.add("Concat", f"{name}_shape", *sides, axis=0)
        by_cell = nodes.add("Reshape", f"{name}_cells", numbers, shape)
        moved = nodes.add("Transpose", f"{name}_moved", by_cell, perm=perm)
        return nodes.add("Reshape", name, moved, flat)

    positions = transposed("merging_positions", (rows, two, columns, two), [1, 3, 0, 2])
    places = transposed("merging_places", (two, two, rows, columns), [2, 0, 3, 1])
    num_destinations = nodes.add("Div", "merging_num_destinations", count, four)
    num_sources = nodes.add("Sub", "merging_num_sources", count, num_destinations)
    percent = nodes.constant("merging_percent", [round(100 * ratio)])
    hundred = nodes.constant("merging_hundred", [100])
    merged = nodes.add(
        "Div", "merging_merged", nodes.add("Mul", "merging_parts", count, percent), hundred
    )
    unmerged = nodes.add("Sub", "merging_unmerged", num_sources, merged)
    return Cells(
        nodes.slice("merging_sources", positions, num_destinations, count, 0),
        nodes.slice("merging_destinations", positions, zero, num_destinations, 0),
        places,
        merged,
        unmerged,
        num_sources,
        num_destinations,
        nodes.count_up("merging_by_destination", num_destinations),
        nodes.count_up("merging_by_unmerged", unmerged),
    )


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """A layer in the graph: what it reads and writes, and the nodes between.

    x: [B, N, C], before normalisation; normed: after it; output: of the last projection
    splits: the reshapes of queries, keys and values to heads; join: that of the result from heads
    between: every value between normed and output
    """

    node: ir.Node
    x: ir.Value
    normed: ir.Value
    output: ir.Value
    splits: tuple[ir.Node, ...]
    join: ir.Node
    between: tuple[ir.Value, ...]

    @classmethod
    def of(cls, node: ir.Node) -> "SelfAttention":
        between, splits = [], []
        for value in node.inputs[:3]:
            transpose = _producer(value, "Transpose")
            split = _producer(transpose.inputs[0], "Reshape")
            product = _producer(split.inputs[0], "MatMul")
            splits.append(split)
            between += [product.outputs[0], split.outputs[0], transpose.outputs[0]]
            normed = product.inputs[0]
        chain = [node]
        for kind in ("Transpose", "Reshape", "MatMul", "Add"):
            ((reader, _),) = chain[-1].outputs[0].uses()
            assert reader.op_type == kind
            chain.append(reader)
        between += [link.outputs[0] for link in chain]
        assert normed is not None
        x = _producer(normed, "LayerNormalization").inputs[0]
        assert x is not None
        output = chain[-1].outputs[0]
        return cls(node, x, normed, output, tuple(splits), chain[2], tuple(between))


def _merge_around(nodes: Nodes, layer: SelfAttention, cells: Cells, prefix: str) -> None:
    """Let a layer attend over merged tokens."""
    graph, shape = nodes.graph, layer.output.shape
    normaliser = layer.normed.producer()
    projections, residuals = list(layer.normed.uses()), list(layer.output.uses())
    projection = layer.output.producer()
    assert normaliser is not None and projection is not None
    ranked, nearest = _match(nodes, layer.x, cells, prefix)
    zero = nodes.constant(f"{prefix}_zero", [0])
    merged = nodes.slice(f"{prefix}_merged", ranked, zero, cells.merged, 1)
    unmerged = nodes.slice(f"{prefix}_unmerged", ranked, cells.merged, cells.num_sources, 1)
    destination = nodes.add("GatherElements", f"{prefix}_destination", nearest, merged, axis=1)
    tokens = _average(nodes, layer.normed, cells, (merged, unmerged, destination), prefix)
    places = _find_places(nodes, cells, ranked, destination, prefix)
    graph.insert_after(normaliser, nodes.take())
    for reader, index in projections:
        reader.replace_input_with(index, tokens)
    _, heads, positions, channels = get_dims(layer.node.outputs[0])
    by_head = nodes.constant(f"{prefix}_heads", [0, 0, int(heads), int(channels)])
    width = nodes.constant(f"{prefix}_width", [0, 0, int(heads) * int(channels)])
    for node, target in (*((split, by_head) for split in layer.splits), (layer.join, width)):
        node.replace_input_with(1, target)
        node.attributes.pop("allowzero", None)  # a 0 in a target keeps the length
    for value in layer.between:
        dims = [MERGED if str(dim) == str(positions) else dim for dim in get_dims(value)]
        value.shape = ir.Shape(dims)
    unmerged_output = nodes.gather_tokens(f"{prefix}_output", layer.output, places)
    unmerged_output.shape = shape
    graph.insert_after(projection, nodes.take())
    for reader, index in residuals:
        reader.replace_input_with(index, unmerged_output)


def _match(nodes: Nodes, x: ir.Value, cells: Cells, prefix: str) -> tuple[ir.Value, ir.Value]:
    """Sources [B, S], those most like a destination first; and of each source, in its own order,
    the destination that is most like it, by the cosine.
    """
    last = nodes.constant(f"{prefix}_last", [-1])
    length = nodes.add("ReduceL2", f"{prefix}_length", x, last, keepdims=1)
    unit = nodes.add("Div", f"{prefix}_unit", x, length)
    sources = nodes.add("Gather", f"{prefix}_unit_sources", unit, cells.sources, axis=1)
    others = nodes.add("Gather", f"{prefix}_unit_destinations", unit, cells.destinations, axis=1)
    columns = nodes.add("Transpose", f"{prefix}_columns", others, perm=[0, 2, 1])
    cosines = nodes.add("MatMul", f"{prefix}_cosines", sources, columns)
    largest = nodes.add("ReduceMax", f"{prefix}_largest", cosines, last, keepdims=0)
    nearest = nodes.integers("ArgMax", f"{prefix}_nearest", cosines, axis=-1, keepdims=0)
    return nodes.rank(f"{prefix}_ranked", largest, cells.num_sources), nearest


def _average(
    nodes: Nodes,
    tokens: ir.Value,
    cells: Cells,
    matches: tuple[ir.Value, ir.Value, ir.Value],
    prefix: str,
) -> ir.Value:
    """Tokens [B, unmerged + destinations, C]: unmerged sources, then destinations, each the mean of
    itself and of the sources that are merged into it.
    """
    moved, rest = (
        nodes.gather_tokens(
            f"{of.name}_tokens",
            tokens,
            nodes.add("Gather", f"{of.name}_positions", cells.sources, of, axis=0),
        )
        for of in matches[:2]
    )
    own = nodes.add("Gather", f"{prefix}_own", tokens, cells.destinations, axis=1)
    middle, last = nodes.constant(f"{prefix}_row", [1]), nodes.constant(f"{prefix}_end", [-1])
    row = nodes.add("Unsqueeze", f"{prefix}_target_row", matches[2], middle)  # [B, 1, merged]
    column = nodes.add("Unsqueeze", f"{prefix}_column", cells.by_destination, middle)
    equal = nodes.add("Equal", f"{prefix}_equal", row, column)  # [B, destinations, merged]
    equal.type = BOOLEAN
    into = nodes.cast(equal, tokens)
    total = nodes.add(
        "Add", f"{prefix}_total", nodes.add("MatMul", f"{prefix}_sum", into, moved), own
    )
    others = nodes.add("ReduceSum", f"{prefix}_others", into, last, keepdims=1)
    count = nodes.add("Add", f"{prefix}_count", others, nodes.scalar(f"{prefix}_self", 1.0, tokens))
    mean = nodes.add("Div", f"{prefix}_mean", total, count)
    joined = nodes.add("Concat", f"{prefix}_tokens", rest, mean, axis=1)
    joined.shape = ir.Shape([*get_dims(tokens)[:1], MERGED, *get_dims(tokens)[2:]])
    return joined


def _find_places(
    nodes: Nodes, cells: Cells, ranked: ir.Value, destination: ir.Value, prefix: str
) -> ir.Value:
    """Of every position of the image, the place of its token among the merged ones: [B, N]."""
    rows = nodes.integers("Shape", f"{prefix}_rows", ranked, start=0, end=1)

    def for_each_row(value: ir.Value, count: ir.Value) -> ir.Value:
        shape = nodes.add("Concat", f"{prefix}_{value.name}_shape", rows, count, axis=0)
        return nodes.add("Expand", f"{prefix}_{value.name}", value, shape)

    shifted = nodes.add("Add", f"{prefix}_shifted", cells.by_destination, cells.unmerged)
    destinations = for_each_row(shifted, cells.num_destinations)
    of_merged = nodes.add("Add", f"{prefix}_of_merged", destination, cells.unmerged)
    of_unmerged = for_each_row(cells.by_unmerged, cells.unmerged)
    by_rank = nodes.add("Concat", f"{prefix}_by_rank", of_merged, of_unmerged, axis=1)
    sources = nodes.add("ScatterElements", f"{prefix}_of_sources", ranked, ranked, by_rank, axis=1)
    numbered = nodes.add("Concat", f"{prefix}_numbered", destinations, sources, axis=1)
    return nodes.add("Gather", f"{prefix}_at", numbered, cells.places, axis=1)


def _producer(value: ir.Value | None, kind: str) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None and node.op_type == kind
    return node


def _attends_to_itself(node: ir.Node) -> bool:
    key = node.inputs[1]
    return key is not None and str(get_dims(key)[2]) != "tokens"


def _width(node: ir.Node) -> int:
    _, heads, _, channels = get_dims(node.outputs[0])
    return int(heads) * int(channels)
