"""Components on ONNX Runtime on the CPU. Imports onnxruntime: import only where it is used."""

import logging
from pathlib import Path

import numpy as np
import onnxruntime as ort

from sdrt.bundle.manifest import Component
from sdrt.engine.call_once import call_once
from sdrt.engine.protocol import Feeds, check_feeds
from sdrt.errors import BackendError

from .cache import FUSED
from .session import create_session, options_with, read_mapped_weights

log = logging.getLogger(__name__)
ARENA_SHRINKAGE = "memory.enable_memory_arena_shrinkage"


@call_once
def initialise() -> None:
    """The binding's NumPy interface, in both directions."""
    for dtype in (np.float32, np.float16, np.int64, np.int32):
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, dtype)).numpy()


class OrtEngine:
    """One session on the CPU; inputs and outputs are bound, not copied.

    optimised: the graph as ONNX Runtime optimised it, if it is in the compile cache
    map_weights: see `LoadOptions`
    """

    def __init__(
        self,
        name: str,
        graph: Path,
        component: Component,
        optimised: Path | None = None,
        *,
        map_weights: bool = False,
    ) -> None:
        self.name = name
        self.inputs, self.outputs = component.inputs, component.outputs
        self._graph, self._optimised, self._map_weights = graph, optimised, map_weights
        self._weights: Feeds = {}
        self._open()

    def _open(self) -> None:
        options, graph, fused = options_with(self._weights), self._graph, None
        if self._map_weights:
            read_mapped_weights(options)
        if self._optimised and not self._weights:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            graph = self._optimised
        elif self._optimised and (path := self._optimised.with_name(FUSED)).exists():
            fused = path.read_bytes()
        self._session: ort.InferenceSession | None = create_session(
            self.name, graph, options, "CPUExecutionProvider", {}, fused
        )
        self._run_options = ort.RunOptions()
        if self.name.startswith("vae") and not self._map_weights:
            # Runs once an image; its activations dwarf all else and are quickly allocated again.
            self._run_options.add_run_config_entry(ARENA_SHRINKAGE, "cpu:0")

    @property
    def keeps_scores(self) -> bool:
        """Whether attention's score matrices are in memory: the graph has no fused kernel."""
        return self._optimised is None or not self._optimised.with_name(FUSED).exists()

    def refit(self, weights: Feeds) -> None:
        """Open another session: weights are packed when a session is created."""
        if not weights and not self._weights:
            return
        self.close()
        self._weights = {n: np.ascontiguousarray(array) for n, array in weights.items()}
        self._open()

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        if (session := self._session) is None:
            raise BackendError(f"{self.name} is closed")
        ready = check_feeds(self.name, self.inputs, feeds)
        binding = session.io_binding()  # one per call: a session serves concurrent calls
        for name, array in ready.items():
            binding.bind_cpu_input(name, array)
        for spec in self.outputs:
            binding.bind_output(spec.name, "cpu")
        try:
            session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise BackendError(f"ONNX Runtime failed in {self.name}: {error}") from error
        values = binding.get_outputs()
        return {s.name: v.numpy() for s, v in zip(self.outputs, values, strict=True)}

    def close(self) -> None:
        self._session = None
