"""Components on OpenVINO, on the CPU. Imports openvino: import only where it is used."""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov

from sdrt.bundle.manifest import WEIGHTS, Component
from sdrt.engine.page_cache import MappedFileUsers, trim_heap
from sdrt.engine.protocol import Feeds, check_feeds
from sdrt.errors import BackendError

from . import cache as openvino_cache

log = logging.getLogger(__name__)
MAPPED_FILES = MappedFileUsers()
LARGE = 512 * 512 * 3  # values of an image, from which on its activations are released


class InferRequestPool:
    """A compiled model and its idle infer requests; more are created on demand, one per concurrent
    call.
    """

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled
        self._free: deque[ov.InferRequest] = deque()
        self._running, self._lock = 0, threading.Lock()

    def infer(self, feeds: Feeds, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Run once; the returned arrays belong to the caller."""
        with self._lock:
            self._running += 1
        try:
            try:
                request = self._free.pop()
            except IndexError:
                request = self._compiled.create_infer_request()
            request.infer(feeds, share_inputs=True, share_outputs=True)
            # A request that fails is dropped; an idle one will overwrite its tensors.
            arrays = {name: request.get_tensor(name).data.copy() for name in outputs}
            self._free.append(request)
            return arrays
        finally:
            with self._lock:
                self._running -= 1

    def release_memory(self) -> None:
        """Release the activations, which the next call allocates again, unless one is running."""
        with self._lock:
            if not self._running:
                self._compiled.release_memory()


class OpenVinoEngine:
    """One compiled model on all cores; concurrent calls wait in OpenVINO's own queue.

    cached: the compiled model in the compile cache, see `cache`
    shapes: of the inputs, if it is compiled for no others
    """

    def __init__(
        self,
        name: str,
        graph: Path,
        component: Component,
        precision: str,
        cached: Path | None = None,
        shapes: openvino_cache.Shapes = openvino_cache.NO_SHAPES,
    ) -> None:
        self.name = name
        self.inputs, self.outputs = component.inputs, component.outputs
        self._graph, self._cached, self._precision = graph, cached, precision
        self._shapes = shapes
        self._refitted = False
        # OpenVINO packs weights once per shape, reading them from the mapped file.
        self._packed: set[tuple[tuple[int, ...], ...]] = set()
        self._open({})

    def _open(self, weights: Feeds) -> None:
        with MAPPED_FILES:
            cached = None if weights else self._imported()
            self._requests: InferRequestPool | None = InferRequestPool(
                cached or self._compile(weights)
            )
        self._packed.clear()
        MAPPED_FILES.drop_pages(self._mapped)

    def _imported(self) -> ov.CompiledModel | None:
        if self._cached is None:
            return None
        self._mapped = self._cached.with_name(openvino_cache.WEIGHTS)
        try:
            return openvino_cache.import_compiled(self._cached, self._precision)
        except RuntimeError as error:
            log.warning(
                "%s: failed to import %s, compiling instead: %s", self.name, self._cached, error
            )
            return None

    def _compile(self, weights: Feeds) -> ov.CompiledModel:
        self._mapped = self._graph.with_name(WEIGHTS)
        core = ov.Core()
        try:
            model = core.read_model(str(self._graph))
            for node in model.get_ops() if weights else ():
                if node.get_type_name() == "Constant" and node.get_friendly_name() in weights:
                    new = ov.op.Constant(weights[node.get_friendly_name()])
                    node.output(0).replace(new.output(0))
            model = openvino_cache.prepare(model, self._precision, self._shapes)
            settings = openvino_cache.compile_settings(self._precision)
            return core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed to load {self._graph}: {error}") from error

    def refit(self, weights: Feeds) -> None:
        """Compile another model: weights are packed when a model is compiled."""
        if weights or self._refitted:
            self.close()
            self._open(weights)
        self._refitted = bool(weights)

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        ready = check_feeds(self.name, self.inputs, feeds)
        shapes = tuple(array.shape for array in ready.values())
        packs = shapes not in self._packed
        with MAPPED_FILES.dropping_pages(self._mapped) if packs else MAPPED_FILES:
            outputs = self._infer(ready)
        self._packed.add(shapes)
        return outputs

    def _infer(self, ready: Feeds) -> dict[str, np.ndarray]:
        if (requests := self._requests) is None:
            raise BackendError(f"{self.name} is closed")
        try:
            outputs = requests.infer(ready, [spec.name for spec in self.outputs])
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed in {self.name}: {error}") from error
        largest = max(array.size for array in (*ready.values(), *outputs.values()))
        if self.name.startswith("vae") and largest >= LARGE:
            # Runs once an image; its activations dwarf all else and are quickly allocated again.
            requests.release_memory()
            trim_heap()
        return outputs

    def release_memory(self) -> None:
        """See `ReleasableMemory`."""
        with MAPPED_FILES:  # or, closed meanwhile, the model could be unmapped while pages drop
            if (requests := self._requests) is not None:
                requests.release_memory()
            del requests

    def close(self) -> None:
        with MAPPED_FILES:
            self._requests = None
