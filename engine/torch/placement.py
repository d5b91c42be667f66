"""Where a graph's constants are: on the device, or on the host, where shapes are computed.

Knows the torch backend's nodes. Copying a constant to the device, or reading one from it, makes the
host wait in every call, and a CUDA graph cannot capture it; so both are decided once.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .compile import ON_HOST, Node


def place_constants(
    nodes: Sequence[Node],
    kinds: Sequence[str],
    constants: Mapping[str, Tensor],
    on_device: Collection[str],
    device: torch.device,
) -> tuple[list[Node], dict[str, Tensor]]:
    """Place every constant where its nodes read it.

    A node with a tensor on the device computes there and reads its constants there, except those
    of `ON_HOST`. A constant that is read in both places is stored in both.

    Args:
        nodes: In the order of the graph.
        kinds: The ONNX operator of every node.
        constants: By name, on the host.
        on_device: The names of inputs and weights.
        device: Where the graph computes.

    Returns:
        The nodes, which read the placed constants, and those by name.
    """
    located = {*on_device, *(name for name, v in constants.items() if v.is_floating_point())}
    placed: dict[str, Tensor] = {}
    result = []
    for (operation, sources, targets, attributes), kind in zip(nodes, kinds, strict=True):
        host = ON_HOST.get(kind)
        computes_there = any(name in located for i, name in enumerate(sources) if i != host)
        names = list(sources)
        for i, name in enumerate(sources):
            if name in constants:
                there = computes_there and i != host
                names[i] = f"{name} on {device}" if there and device.type != "cpu" else name
                placed[names[i]] = constants[name].to(device) if there else constants[name]
        if computes_there and kind != "Shape":
            located.update(targets)
        result.append((operation, names, targets, attributes))
    return result, placed
