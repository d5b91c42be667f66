"""A second attention in every cross-attention layer of a UNet's graph: to an image's tokens.

Knows where the layers are in a graph that torch exported; not what makes keys and values.
"""

from collections.abc import Sequence

import onnx_ir as ir

from sdrt.bundle.manifest import IP_ADAPTER_KV, IP_ADAPTER_SCALE

from .new_nodes import NewNodes, add_input, get_dims
from .unet_config import UnetConfig


def add_image_attention(graph: ir.Graph, config: UnetConfig) -> None:
    """Let every cross-attention layer attend to an image's tokens as well (Ye et al. 2023,
    arXiv:2308.06721): with the same queries, and keys and values that are inputs of the graph.

    The inputs are `ip_adapter_kv` [rows, image_tokens, 2 * channels of all layers], each layer's
    keys before its values, and `ip_adapter_scale` [rows, layers].
    """
    layers = _cross_attentions(graph, config)
    if not layers:
        return
    context = next(value for value in graph.inputs if value.name == "context")
    widths = [width for node in layers for width in [_width(node)] * 2]
    rows = get_dims(context)[0]
    nodes = NewNodes(graph)
    kv = add_input(graph, IP_ADAPTER_KV, [rows, "image_tokens", sum(widths)], context)
    scale = add_input(graph, IP_ADAPTER_SCALE, [rows, len(layers)], context)
    keys_values = nodes.split(kv, 2, widths)
    scales = nodes.split(scale, 1, [1] * len(layers))
    graph.insert_before(graph[0], nodes.take())
    for i, node in enumerate(layers):
        joined = _join_of_heads(node)
        _attend(nodes, node, joined, keys_values[2 * i : 2 * i + 2], scales[i])
        graph.insert_after(joined, nodes.take())


def _cross_attentions(graph: ir.Graph, config: UnetConfig) -> list[ir.Node]:
    """Every cross-attention in the order of IP-Adapter's files: the middle, which the graph has
    between the way down and the way up, is last.
    """
    nodes = [node for node in graph if node.op_type == "Attention" and _reads_tokens(node)]
    down, mid, up = config.cross_attention_counts
    assert len(nodes) == down + mid + up
    return nodes[:down] + nodes[down + mid :] + nodes[down : down + mid]


def _reads_tokens(node: ir.Node) -> bool:
    key = node.inputs[1]
    return key is not None and str(get_dims(key)[2]) == "tokens"


def _width(node: ir.Node) -> int:
    _, heads, _, channels = get_dims(node.outputs[0])
    return int(heads) * int(channels)


def _join_of_heads(attention: ir.Node) -> ir.Node:
    """What reshapes an attention's output to [rows, positions, channels]. The sum is there: up to
    it, backends fuse the attention to the text as they do in the plain graph.
    """
    node = attention
    while node.op_type != "Reshape":
        ((node, _),) = node.outputs[0].uses()
    return node


def _logit_scale(attention: ir.Node, channels: int) -> float:
    scale = attention.attributes.get("scale")
    return float(channels**-0.5 if scale is None else scale.value)


def _attend(
    nodes: NewNodes,
    node: ir.Node,
    join: ir.Node,
    keys_values: Sequence[ir.Value],
    scale: ir.Value,
) -> None:
    """Add a second attention of the same query, times a scale, to a cross-attention's output."""
    output, query, joined = node.outputs[0], node.inputs[0], join.outputs[0]
    assert query is not None
    readers, prefix = list(joined.uses()), f"image_{node.name}"
    _, heads, _, channels = get_dims(output)
    by_head = nodes.constant(f"{prefix}_heads", [0, 0, int(heads), int(channels)])
    alone = nodes.constant(f"{prefix}_alone", [-1, 1, 1, 1])
    factor = nodes.cast(nodes.add("Reshape", f"{scale.name}_alone", scale, alone), output)
    root = nodes.scalar(f"{prefix}_root", _logit_scale(node, int(channels)), output)
    # Written out: TensorRT for RTX 1.7 crashes on a second Attention of one query. Scaled are keys
    # and values, which are small, not the query and the result.
    pair = []
    for part, perm, by in zip(
        keys_values, ([0, 2, 3, 1], [0, 2, 1, 3]), (root, factor), strict=True
    ):
        split = nodes.cast(nodes.add("Reshape", f"{part.name}_heads", part, by_head), output)
        scaled = nodes.add("Mul", f"{part.name}_scaled", split, by)
        pair.append(nodes.add("Transpose", f"{part.name}_by_head", scaled, perm=perm))
    keys, values = pair
    logits = nodes.add("MatMul", f"{prefix}_logits", query, keys)
    weights = nodes.add("Softmax", f"{prefix}_weights", logits, axis=-1)
    attended = nodes.add("MatMul", prefix, weights, values)
    turned = nodes.add("Transpose", f"{prefix}_by_position", attended, perm=[0, 2, 1, 3])
    width = nodes.constant(f"{prefix}_width", [0, 0, int(heads) * int(channels)])
    own = nodes.cast(nodes.add("Reshape", f"{prefix}_joined", turned, width), joined)
    total = nodes.add("Add", f"{prefix}_sum", joined, own)
    total.shape = joined.shape
    for reader, index in readers:
        reader.replace_input_with(index, total)
