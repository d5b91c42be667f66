"""Which of a component's stored weights a graph reads, and as what.

Knows graphs and the file next to them; not what reads them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from sdrt.errors import BundleError

from .manifest import NAMES, WEIGHTS
from .onnx_check import graph_values
from .safetensors import Tensors

LAYERS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, slots=True)
class GraphWeights:
    """The stored weights that a graph reads.

    layers: those of linear layers and convolutions, which LoRA files change
    others: norms, biases, embeddings
    """

    layers: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of the layers' names, for a plan's key."""
        return hashlib.sha256("\0".join(self.layers).encode()).hexdigest()[:16]


def read_graph_weights(graph: Path) -> GraphWeights:
    """The weights of a graph and of the file next to it.

    Raises:
        BundleError: It is not a graph of sdrt, or the file does not have the checkpoint's names.
    """
    stored = Tensors(graph.with_name(WEIGHTS))
    if stored.metadata != NAMES:
        raise BundleError(
            f"{graph.parent} was built without the weights' names that LoRA needs",
            hint="run `sdrt build --model` again with --force",
        )
    nodes, _ = graph_values(graph)
    read = {name for _, inputs in nodes for name in inputs} & set(stored)
    layers = {name for kind, inputs in nodes if kind in LAYERS for name in inputs} & read
    matrices = {name for name in layers if len(stored.shape(name)) > 1}
    return GraphWeights(tuple(sorted(matrices)), tuple(sorted(read - matrices)))
