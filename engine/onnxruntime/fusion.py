"""Graphs with ONNX Runtime's own fused operators: attention with the split into heads and, on CUDA,
group normalisation with the activation after it.

Knows ONNX and the operators of `com.microsoft`. ONNX Runtime's transformers optimizer matches
decomposed attention, and finds nothing in these graphs, which have `Attention` and
`GroupNormalization` nodes. The weights stay in the bundle's file. Group normalisation has a kernel
on CUDA only; it has not run yet.
"""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

DOMAIN = "com.microsoft"
WIDEST = 256  # head that fused attention serves
HEADS_LAST = [0, 2, 1, 3]
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # channels


class GraphRewriter:
    """A graph that is rewritten: every value's producer and consumers, and the new nodes."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.consumers = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        values = (*self.graph.value_info, *self.graph.output)
        self.shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
        self.weight_shapes = {tensor.name: tensor.dims for tensor in self.graph.initializer}
        self.output_names = {value.name for value in self.graph.output}
        self.new: dict[str, list[Any]] = {}  # by the output whose producer they replace

    def producer(self, name: str, operator: str) -> Any:
        """The node that produces a value, if it is of this kind, or None."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == operator else None

    def only_consumer(self, name: str, operator: str) -> Any:
        """The only node that reads a value, if it is of this kind, or None."""
        readers = self.consumers[name] if name not in self.output_names else []
        return readers[0] if len(readers) == 1 and readers[0].op_type == operator else None

    def apply(self) -> None:
        """Insert the new nodes at the last of those they replace, and remove unused nodes."""
        nodes = [
            new
            for node in self.graph.node
            for new in (self.new.get(node.output[0], [node]) if node.output else [node])
        ]
        read = set(self.output_names)
        alive = []
        for node in reversed(nodes):
            if read.intersection(node.output):
                read.update(node.input)
                alive.append(node)
        del self.graph.node[:]
        self.graph.node.extend(reversed(alive))


def write_fused_graph(graph: Path, out: Path, *, norms: bool = True) -> tuple[float, int]:
    """Write the graph with fused operators; its weights are in the first one's folder. Returns the
    seconds that it took, and 0 for the memory, which is little.

    norms: group normalisation too, which has a kernel on CUDA only
    """
    began = time.monotonic()
    model = onnx.load(graph, load_external_data=False)
    rewriter = GraphRewriter(model)
    for node in list(model.graph.node):
        if node.op_type == "Attention":
            _fuse_attention(rewriter, node)
        elif norms and node.op_type == "GroupNormalization":
            _fuse_norm(rewriter, node)
    rewriter.apply()
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    out.write_bytes(model.SerializeToString())
    return time.monotonic() - began, 0


def _attributes(node: Any) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _fuse_attention(graph: GraphRewriter, node: Any) -> None:
    """Fuse attention without a mask, with the split into heads and their concatenation."""
    shape = graph.shapes.get(node.input[0])
    if len(node.input) > 3 or shape is None or not 0 < shape[3].dim_value <= WIDEST:
        return
    sources = []
    for name in node.input:
        turned = graph.producer(name, "Transpose")
        split = graph.producer(turned.input[0], "Reshape") if turned is not None else None
        if split is None or _attributes(turned)["perm"] != HEADS_LAST:
            return
        sources.append(split.input[0])
    turned = graph.only_consumer(node.output[0], "Transpose")
    joined = graph.only_consumer(turned.output[0], "Reshape") if turned is not None else None
    if joined is None or _attributes(turned)["perm"] != HEADS_LAST:
        return
    scale = _attributes(node).get("scale")
    graph.new[joined.output[0]] = [
        helper.make_node(
            "MultiHeadAttention",
            sources,
            [joined.output[0]],
            name=f"{node.name}_fused",
            domain=DOMAIN,
            num_heads=shape[1].dim_value,
            **({} if scale is None else {"scale": scale}),
        )
    ]


def _fuse_norm(graph: GraphRewriter, node: Any) -> None:
    """Fuse group normalisation, and a SiLU after it, with channels last. The kernel reads pairs, so
    an odd number of channels in a group stays as it is.
    """
    source, scale, bias = node.input
    attributes = _attributes(node)
    if graph.weight_shapes.get(scale, [1])[0] % (2 * attributes["num_groups"]):
        return
    name, out, activation = node.output[0], node.output[0], 0
    readers = graph.consumers[name] if name not in graph.output_names else []
    sigmoid = next((reader for reader in readers if reader.op_type == "Sigmoid"), None)
    if sigmoid is not None and len(readers) == 2:
        product = graph.only_consumer(sigmoid.output[0], "Mul")
        if product is not None and set(product.input) == {name, sigmoid.output[0]}:
            out, activation = product.output[0], 1
    single = [f"{name}.scale", f"{name}.bias"]
    graph.new[out] = [
        helper.make_node("Transpose", [source], [f"{name}.last"], perm=TO_LAST),
        helper.make_node("Cast", [scale], [single[0]], to=TensorProto.FLOAT),
        helper.make_node("Cast", [bias], [single[1]], to=TensorProto.FLOAT),
        helper.make_node(
            "GroupNorm",
            [f"{name}.last", *single],
            [f"{name}.normalised"],
            name=f"{node.name}_fused",
            domain=DOMAIN,
            activation=activation,
            channels_last=1,
            epsilon=attributes.get("epsilon", 1e-5),
            groups=attributes["num_groups"],
        ),
        helper.make_node("Transpose", [f"{name}.normalised"], [out], perm=TO_FIRST),
    ]
