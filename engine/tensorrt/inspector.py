"""What became of a graph's attention and normalisation in TensorRT.

Knows the network half of TensorRT's API, and the engine inspector's JSON. Without a GPU it is said
which nodes TensorRT has to serve by a fused kernel, or else its build fails; with one, which layers
of the built engine every node went into. The inspector has never run.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .builder import attention_layers, parse_network
from .variants import get_logger, load_module

ATTENTION, NORMALISATION, DECOMPOSED = "attention", "normalisation", "attention, decomposed"


def group_nodes(kind: str, graph: Path) -> dict[str, list[str]]:
    """The graph's nodes by what TensorRT makes of them: attention that must have a fused kernel,
    attention that is decomposed into products and a softmax, and normalisation.

    Raises BackendError where this TensorRT is missing or does not take the graph.
    """
    trt = load_module(kind)
    builder = trt.Builder(get_logger(trt))
    network, _parser = parse_network(trt, builder, graph)
    groups: dict[str, list[str]] = {ATTENTION: [], DECOMPOSED: [], NORMALISATION: []}
    for name, attention in attention_layers(trt, network):
        groups[DECOMPOSED if attention.decomposable else ATTENTION].append(name)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.NORMALIZATION:
            groups[NORMALISATION].append(layer.name)
    return groups


def inspect_layers(trt: Any, engine: Any) -> list[Mapping[str, Any]]:
    """The layers of a built engine, as its inspector tells them."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers: list[Mapping[str, Any]] = json.loads(text)["Layers"]
    return layers


def layers_by_node(
    nodes: Iterable[str], layers: Iterable[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Of every node, the names of the engine's layers that it went into. A layer names the nodes
    that it computes as `[ONNX Layer: NAME]`.
    """
    names: dict[str, list[str]] = {node: [] for node in nodes}
    for record in layers:
        for mark in str(record.get("Metadata", "")).split("[ONNX Layer: ")[1:]:
            if (node := mark.split("]")[0]) in names:
                names[node].append(str(record.get("Name", "")))
    return names
