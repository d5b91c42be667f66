"""Replacing the weights of plans that LoRA files change.

Knows stored weights and TensorRT's refitter; not what the new weights are. Not yet run on a GPU.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle.graph_weights import read_graph_weights
from sdrt.bundle.manifest import CONTROL, LORA_PARTS, TEXT_ENCODERS, WEIGHTS
from sdrt.bundle.safetensors import Tensors
from sdrt.engine.plans import PlanKey
from sdrt.errors import BackendError

LORA_COMPONENTS = ("unet", CONTROL, *TEXT_ENCODERS, *LORA_PARTS.values())
OTHER_WAYS = (
    "merge the file when the bundle is built (`sdrt build --lora`), or pass --backend onnxruntime"
)
Weights = Mapping[str, np.ndarray]


def mark_refittable(network: Any, names: Iterable[str]) -> None:
    """Let a network's weights be replaced; raises BackendError for a name that it does not have."""
    if unknown := [name for name in names if not network.mark_weights_refittable(name)]:
        raise BackendError(f"TensorRT's network has no {unknown[0]} ({len(unknown)} such weights)")


def fixed_weights_error(key: PlanKey, bundle: Path) -> BackendError:
    """What to do about a plan that was built for the bundle's own weights."""
    if key.streamed:
        return BackendError(
            f"the plan of {key.component} streams its weights and accepts no others",
            hint="load the bundle without low_memory (`--low-memory`)",
        )
    command = f"sdrt build --bundle {bundle} --backend {key.kind} --switch-lora"
    return BackendError(
        f"the plan of {key.component} was not built for other weights",
        hint=f"run `{command}`, or {OTHER_WAYS}",
    )


class PlanRefitter:
    """Replaces weights of one loaded engine. Every change starts from the bundle's own weights,
    which are sent again for whatever an earlier change replaced.

    Nothing may run on the engine meanwhile.
    """

    def __init__(self, trt: Any, engine: Any, logger: Any, component: str, graph: Path) -> None:
        self._trt, self._engine, self._logger, self._component = trt, engine, logger, component
        self._stored = Tensors(graph.with_name(WEIGHTS))
        self._weights = read_graph_weights(graph)
        self._replaced: set[str] = set()
        self._sent: Weights = {}

    def select(self, weights: Weights) -> dict[str, np.ndarray]:
        """Those of the weights that the graph reads; raises BackendError for one that the plan
        cannot replace.
        """
        if fixed := [name for name in self._weights.others if name in weights]:
            raise BackendError(
                f"the plan of {self._component} replaces the weights of linear layers and "
                f"convolutions, not {fixed[0]} ({len(fixed)} such weights)",
                hint=OTHER_WAYS,
            )
        layers = set(self._weights.layers)
        chosen = {name: array for name, array in weights.items() if name in layers}
        return {name: np.require(array, requirements=("C", "A")) for name, array in chosen.items()}

    def has_changes(self, weights: Weights) -> bool:
        """Whether `replace` has anything to do."""
        return bool(weights or self._replaced)

    def replace(self, weights: Weights, stream: int) -> None:
        """Enqueue the replacement in a stream.

        Raises BackendError where TensorRT refuses; the weights are then undefined until the next
        replacement.
        """
        try:
            self._replace(weights, stream)
        except (RuntimeError, TypeError) as error:  # pybind's
            raise self._error(str(error)) from error

    def _replace(self, weights: Weights, stream: int) -> None:
        trt = self._trt
        refitter = trt.Refitter(self._engine, self._logger)
        restored = self._replaced - set(weights)
        self._replaced |= set(weights)
        arrays = {**self._read(restored), **weights}
        self._set(refitter, arrays)
        # What TensorRT combined while it optimised, it replaces together.
        combined = [name for name in refitter.get_missing_weights() if name not in arrays]
        arrays |= (own := self._read(combined))
        self._set(refitter, own)
        if missing := refitter.get_missing_weights():
            raise self._error(f"weights are missing: {', '.join(missing[:3])}")
        if not refitter.refit_cuda_engine_async(stream):
            raise self._error(" / ".join(self._logger.errors) or "no reason reported")
        self._replaced = set(weights)
        self._sent = arrays

    def _read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The bundle's own weights."""
        if unknown := sorted(set(names) - set(self._stored)):
            raise self._error(f"it asks for {unknown[0]!r}, which the bundle does not have")
        return {name: np.require(self._stored[name], requirements=("C", "A")) for name in names}

    def _set(self, refitter: Any, arrays: Weights) -> None:
        trt = self._trt
        for name, array in arrays.items():
            if not refitter.set_named_weights(name, trt.Weights(array)):
                raise self._error(f"it refuses {name}, {array.dtype} {list(array.shape)}")

    def _error(self, reason: str) -> BackendError:
        message = f"TensorRT failed to replace the weights of {self._component}: {reason}"
        return BackendError(message, hint=OTHER_WAYS)
