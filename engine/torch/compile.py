"""A graph at known shapes as a straight list of tensor operations, and that list compiled.

Knows torch and the torch backend's operations. What depends on shapes and constants alone is worked
out once, without an input or a weight being read; what is left reads no number on the host, which
`torch.compile` could not follow. Weights are arguments of what is compiled, so others take their
place at no cost.
"""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sdrt.errors import BackendError

Operation = Callable[[list[Any], dict[str, Any]], Any]
# What runs, the names of what it reads and of what it makes, and the node's attributes.
Node = tuple[Operation, list[str], list[str], dict[str, Any]]
# Alike, with numbers in place of what would be read on the host.
Step = tuple[Operation, list[str | list[float] | None], list[str], dict[str, Any]]
Compiled = Callable[[Sequence[Tensor]], list[Tensor]]
# Of these operations, which input is read on the host.
ON_HOST = {"Expand": 1, "Reshape": 1, "Resize": 2, "Split": 1, "Squeeze": 1, "Unsqueeze": 1}


def fold_constants(
    nodes: Sequence[Node],
    kinds: Sequence[str],
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
) -> tuple[list[Step], dict[str, Tensor]]:
    """The steps that compute with what is given, and the constants that they read.

    kinds: the ONNX operator of every node
    given: inputs and weights, of which shape and dtype alone are used
    Raises BackendError where a shape depends on the values of an input.
    """
    values: dict[str, Any] = {"": None, **constants}
    values |= {name: torch.empty_like(value, device="meta") for name, value in inputs.items()}
    left: list[Step] = []
    for (operation, reads, targets, attributes), kind in zip(nodes, kinds, strict=True):
        place = ON_HOST.get(kind) if len(reads) > ON_HOST.get(kind, 0) else None
        read = [values[name] for name in reads]
        if any(map(_unread, read)):
            read = [_numbers(v, kind) if i == place else _meta(v) for i, v in enumerate(read)]
        results = operation(read, attributes)
        results = results if isinstance(results, tuple) else (results,)
        values.update(zip(targets, results, strict=False))
        if _unread(results[0]):
            sources = [read[i] if i == place else name for i, name in enumerate(reads)]
            left.append((operation, sources, targets, attributes))
    names = {name for _, sources, _, _ in left for name in sources if isinstance(name, str)}
    return left, {n: values[n] for n in sorted(names) if n and not _unread(values[n])}


def _unread(value: Tensor | None) -> bool:
    return value is not None and value.device.type == "meta"


def _meta(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to("meta")


def _numbers(value: Tensor | None, kind: str) -> list[float] | None:
    if _unread(value):
        raise BackendError(
            f"a {kind} of this graph has a shape that depends on an input's values, which "
            "torch.compile cannot follow; run without compiling"
        )
    return None if value is None else value.reshape(-1).tolist()


def compiled(steps: Sequence[Step], names: Sequence[str], outputs: Sequence[str]) -> Compiled:
    """The steps as one function of the tensors of these names; it compiles when first called."""

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        values: dict[str, Any] = {"": None, **dict(zip(names, tensors, strict=True))}
        for operation, sources, targets, attributes in steps:
            inputs = [values[source] if isinstance(source, str) else source for source in sources]
            results = operation(inputs, attributes)
            results = results if isinstance(results, tuple) else (results,)
            for target, value in zip(targets, results, strict=False):
                values[target] = value
        return [values[name] for name in outputs]

    return torch.compile(_copy_function(run), fullgraph=True, dynamic=False)


def _copy_function(function: Callable[..., Any]) -> FunctionType:
    """A function with a code object of its own.

    TorchDynamo caches what it compiles on the code object, at most `recompile_limit` (8) entries,
    which all closures of one `def` share. With its own code object each compiled graph has its own
    cache, which is freed with the function.
    """
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
