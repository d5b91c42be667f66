"""A bundle's graph for TensorRT before 10.14, whose parser takes opset 20 and no `Attention`.

Knows ONNX; not TensorRT. The graph keeps its inputs, outputs and weights, so that the bundle's
weight file serves both. Attention is written out as two products with a softmax between them, the
queries scaled before the first, which is the pattern that TensorRT fuses ("Fused Attention" in its
documentation). Group normalisation, whose scale became one per channel with opset 21, is written
out as instance normalisation of the groups. Other operators only gained types after opset 20.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdrt.errors import BackendError

OPSET = 20
IR_VERSION = 9  # of opset 20
# Newer after opset 20, by types alone; a test compares both definitions.
SAME_OPERATORS = frozenset(
    {
        *("AveragePool", "Cast", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos"),
        *("Flatten", "Identity", "InstanceNormalization", "MaxPool", "Pad", "Reshape", "Round"),
        *("Shape", "Sin", "Size", "Softplus", "Squeeze", "Transpose", "Unsqueeze"),
    }
)
KEYS_LAST = [0, 1, 3, 2]
# Attention as exported: one output, keys and values of as many heads as queries, no cache.
PLAIN_ATTENTION = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}


def opset20_graph(graph: Path) -> bytes:
    """The serialized graph; its weights stay in the file that they are in.

    Raises:
        BackendError: An operator has no counterpart in opset 20.
    """
    model = onnx.load(graph, load_external_data=False)
    (opset,) = [opset for opset in model.opset_import if not opset.domain]
    rewriter = _Rewriter(model.graph, opset.version)
    nodes = [new for node in model.graph.node for new in rewriter.rewrite(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(rewriter.constants.values())
    opset.version = OPSET
    model.ir_version = min(model.ir_version, IR_VERSION)
    content: bytes = model.SerializeToString()
    return content


@dataclass
class _Rewriter:
    """Replaces nodes; what several of them share is added once.

    Attributes:
        opset: Of the graph as it is.
        types: Dtype and shape of every value that the graph describes.
        constants: New initializers.
        masks: The masks that are computed from truth values.
    """

    graph: Any
    opset: int
    types: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    masks: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        values = (*self.graph.input, *self.graph.value_info, *self.graph.output)
        self.types = {value.name: value.type.tensor_type for value in values}

    def rewrite(self, node: Any) -> Iterator[Any]:
        """The nodes of opset 20 that compute a node's outputs."""
        if node.op_type == "Attention":
            yield from self._attention(node)
        elif node.op_type == "GroupNormalization":
            yield from self._group_norm(node)
        elif node.op_type in SAME_OPERATORS or self._since(node) <= OPSET:
            yield node
        else:
            raise _no_counterpart(node, "it is newer")

    def _attention(self, node: Any) -> Iterator[Any]:
        """softmax(scale * Q @ transposed K + mask) @ V; Q [B, heads, N, width]."""
        query, key, value, *more = node.input
        attributes = _attributes(node)
        shape, dtype = self._shape(node, query), self.types[query].elem_type
        kind = {name: attributes.get(name, plain) for name, plain in PLAIN_ATTENTION.items()}
        odd = {"q_num_heads", "kv_num_heads"}.intersection(attributes) or len(shape) != 4
        if odd or len(node.output) > 1 or len(more) > 1 or kind != PLAIN_ATTENTION:
            raise _no_counterpart(node, f"it has {attributes}, {len(node.input)} inputs")
        if not (scale := attributes.get("scale")):
            if not shape[3]:
                raise _no_counterpart(node, "its width is not known")
            scale = shape[3] ** -0.5
        name, out = node.name, node.output[0]
        scores, weights = f"{out}.scores", f"{out}.weights"
        factor = self._constant(f"{out}.scale", scale, dtype)
        yield helper.make_node("Mul", [query, factor], [f"{out}.query"], name=f"{name}_scale")
        yield helper.make_node("Transpose", [key], [f"{out}.key"], f"{name}_key", perm=KEYS_LAST)
        yield helper.make_node("MatMul", [f"{out}.query", f"{out}.key"], [scores], f"{name}_scores")
        if more and more[0]:
            mask, nodes = self._added_mask(node, more[0], dtype)
            yield from nodes
            masked = f"{scores}.masked"
            yield helper.make_node("Add", [scores, mask], [masked], name=f"{name}_masked")
            scores = masked
        yield helper.make_node("Softmax", [scores], [weights], name=f"{name}_weights", axis=-1)
        yield helper.make_node("MatMul", [weights, value], [out], name=name)

    def _group_norm(self, node: Any) -> Iterator[Any]:
        """Instance normalisation of [B, groups, everything else], then scale and bias."""
        source, scale, bias = node.input
        attributes, rank = _attributes(node), len(self._shape(node, source))
        dtype, groups = self.types[source].elem_type, attributes["num_groups"]
        name, out = node.name, node.output[0]
        ones = self._constant(f"ones_{groups}_{dtype}", [1.0] * groups, dtype)
        zeros = self._constant(f"zeros_{groups}_{dtype}", [0.0] * groups, dtype)
        grouped = self._constant(f"group_{groups}", [0, groups, -1], TensorProto.INT64)
        axes = self._constant(f"axes_{rank}", list(range(1, rank - 1)), TensorProto.INT64)
        make, epsilon = helper.make_node, attributes.get("epsilon", 1e-5)
        yield make("Shape", [source], [f"{out}.shape"], f"{name}_shape")
        yield make("Reshape", [source, grouped], [f"{out}.groups"], f"{name}_groups")
        inputs, normalised = [f"{out}.groups", ones, zeros], f"{out}.normalised"
        yield make("InstanceNormalization", inputs, [normalised], name=name, epsilon=epsilon)
        yield make("Reshape", [normalised, f"{out}.shape"], [f"{out}.same"], f"{name}_same")
        yield make("Unsqueeze", [scale, axes], [f"{out}.scale"], f"{name}_scale")
        yield make("Unsqueeze", [bias, axes], [f"{out}.bias"], f"{name}_bias")
        yield make("Mul", [f"{out}.same", f"{out}.scale"], [f"{out}.scaled"], f"{name}_scaled")
        yield make("Add", [f"{out}.scaled", f"{out}.bias"], [out], f"{name}_shifted")

    def _added_mask(self, node: Any, mask: str, dtype: int) -> tuple[str, list[Any]]:
        """The mask to add to scores, 0 where attention is allowed, and the nodes that it takes the
        first time.
        """
        self._shape(node, mask)
        if self.types[mask].elem_type != TensorProto.BOOL:
            return mask, []
        added = f"{mask}.added_{dtype}"
        if added in self.masks:
            return added, []
        self.masks.add(added)
        lowest = np.finfo(helper.tensor_dtype_to_np_dtype(dtype)).min
        allowed = self._constant(f"allowed_{dtype}", 0, dtype)
        ignored = self._constant(f"ignored_{dtype}", lowest, dtype)
        return added, [helper.make_node("Where", [mask, allowed, ignored], [added], name=added)]

    def _shape(self, node: Any, name: str) -> list[int]:
        """A value's shape, 0 for an axis without a fixed length."""
        if name not in self.types:
            raise _no_counterpart(node, "the shape of its input is not known")
        return [dim.dim_value for dim in self.types[name].shape.dim]

    def _since(self, node: Any) -> int:
        """The opset that defines the node's operator."""
        return int(onnx.defs.get_schema(node.op_type, self.opset, node.domain).since_version)

    def _constant(self, name: str, value: Any, dtype: int) -> str:
        array = np.asarray(value, helper.tensor_dtype_to_np_dtype(dtype))
        self.constants[name] = numpy_helper.from_array(array, name)
        return name


def _attributes(node: Any) -> Mapping[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _no_counterpart(node: Any, reason: str) -> BackendError:
    return BackendError(
        f"{node.name} ({node.op_type}) has no counterpart in opset {OPSET}: {reason}",
        hint="install TensorRT 10.14 or later",
    )
