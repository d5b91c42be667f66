"""What a torch module computes with LoRA factors, which the graph with factors is compared with.

Knows torch's modules and their names; not graphs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdrt.bundle.manifest import LORA_FACTORS, TRANSPOSED
from sdrt.engine import Feeds
from sdrt.runtime import randn

from .lora_graph import PLACES

SCALE = 0.05  # of random factors, so that they change the output without drowning it
# By layer, `down` [in, rank] and `up` [rank, out].
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class LoraCase:
    """Inputs, the factors of every layer that may have them, and torch's outputs."""

    inputs: Feeds
    factors: Factors
    outputs: Feeds

    def feeds(self, weights: Sequence[str]) -> dict[str, np.ndarray]:
        """The inputs of the graph; weights: of its layers, in their order."""
        layers = [name.removesuffix(TRANSPOSED).removesuffix(".weight") for name in weights]
        row = np.concatenate([part.ravel() for name in layers for part in self.factors[name]])
        rows = len(next(iter(self.inputs.values())))
        return {**self.inputs, LORA_FACTORS: np.repeat(row[None], rows, axis=0)}


def compute_lora_case(
    module: nn.Module, rank: int, inputs: Feeds, outputs: Sequence[str]
) -> LoraCase:
    """Torch's outputs with seeded factors of every linear layer and convolution of 1x1 in the
    module's attention blocks; outputs: their names.
    """
    factors = {
        name: (
            np.float32(SCALE) * randn(2 * i, (inside, rank)),
            np.float32(SCALE) * randn(2 * i + 1, (rank, out)),
        )
        for i, (name, inside, out) in enumerate(_list_layers(module))
    }
    with _with_factors(module, factors):
        output: Any = module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    tensors = output if isinstance(output, tuple) else (output,)
    arrays = {name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=True)}
    return LoraCase(inputs, factors, arrays)


def _list_layers(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Names of layers with their inputs and outputs."""
    for name, layer in module.named_modules():
        if not any(place in name for place in PLACES):
            continue
        if isinstance(layer, nn.Linear):
            yield name, layer.in_features, layer.out_features
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            yield name, layer.in_channels, layer.out_channels


@contextmanager
def _with_factors(module: nn.Module, factors: Factors) -> Iterator[None]:
    with ExitStack() as stack:
        for name, (down, up) in factors.items():
            product = torch.from_numpy(down @ up).T  # [out, in]
            hook = module.get_submodule(name).register_forward_hook(partial(_add, product))
            stack.callback(hook.remove)
        yield


def _add(product: Tensor, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    (x,) = inputs
    equation = "oi,bi...->bo..." if x.ndim == 4 else "oi,...i->...o"
    return output + torch.einsum(equation, product, x)
