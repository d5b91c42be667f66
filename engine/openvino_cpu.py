"""Components on OpenVINO, on the CPU. Knows openvino; imported only when this backend is chosen."""

import mmap
from pathlib import Path

import numpy as np
import openvino as ov

from sdrt.bundle import WEIGHTS
from sdrt.errors import BackendError
from sdrt.manifest import Component

from .mapped import let_go, trim
from .openvino_turned import put_turned
from .protocol import Feeds, checked_feeds

LARGE = 512 * 512 * 3 * 4  # bytes of a picture whose activations are given back


class OpenVinoEngine:
    """One compiled model; one request at a time, on all cores.

    turned: weights of products as OpenVINO wants them, see `openvino_turned`
    """

    def __init__(
        self,
        name: str,
        graph: Path,
        component: Component,
        precision: str,
        turned: Path | None = None,
    ) -> None:
        self.name = name
        self.inputs, self.outputs = component.inputs, component.outputs
        self._graph, self._precision = graph, precision
        self._weights = graph.with_name(WEIGHTS)
        self._refitted, self._turned = False, turned
        self._mapped: mmap.mmap | None = None
        # What OpenVINO has packed it packs by shape, and reads from the mapped file to do so.
        self._packed: set[tuple[tuple[int, ...], ...]] = set()
        self._open({})

    def _open(self, weights: Feeds) -> None:
        core = ov.Core()
        settings = {  # fp32 or bf16; the graph itself stays as it is stored
            "INFERENCE_PRECISION_HINT": self._precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            model = core.read_model(str(self._graph))
            for node in model.get_ops() if weights else ():
                if node.get_type_name() == "Constant" and node.get_friendly_name() in weights:
                    new = ov.op.Constant(weights[node.get_friendly_name()])
                    node.output(0).replace(new.output(0))
            if self._turned and not weights:
                self._mapped = put_turned(model, self._turned)
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot load {self._graph}: {error}") from error
        self._compiled: ov.CompiledModel | None = compiled
        self._request: ov.InferRequest | None = compiled.create_infer_request()
        self._packed.clear()
        self._let_go()

    def refit(self, weights: Feeds) -> None:
        """Another model in the first one's place: its weights are packed for the processor."""
        if weights or self._refitted:
            self.close()
            self._open(weights)
        self._refitted = bool(weights)

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        if self._request is None:
            raise BackendError(f"{self.name} is closed")
        ready = checked_feeds(self.name, self.inputs, feeds)
        try:
            self._request.infer(ready, share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed in {self.name}: {error}") from error
        shapes = tuple(array.shape for array in ready.values())
        if shapes not in self._packed:
            self._packed.add(shapes)
            self._let_go()
        made = {spec.name: self._request.get_tensor(spec.name).data for spec in self.outputs}
        most = max(array.nbytes for array in (*ready.values(), *made.values()))
        if self._compiled and self.name.startswith("vae") and most >= LARGE:
            # Once a picture: its activations dwarf all else, and are made again in a moment.
            self._compiled.release_memory()
            trim()
        return made

    def _let_go(self) -> None:
        let_go(self._weights)
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._request = self._compiled = self._mapped = None
