"""Components on TensorRT and on TensorRT for RTX, one code path for both.

Knows loaded plans; not how one is laid out. Never run on a GPU yet.
"""

import logging
from typing import Any

import numpy as np

from sdrt.bundle.manifest import Component
from sdrt.engine.protocol import Feeds, check_feeds
from sdrt.engine.sampling import SamplingProgram, SamplingResult
from sdrt.errors import BackendError

from .loaded_plan import Loaded, loaded_plans, loading
from .sampling_graph import Loops

log = logging.getLogger(__name__)


class TrtEngine:
    """One component of one pipeline."""

    def __init__(self, name: str, component: Component, loaded: Loaded, stream: int = 0) -> None:
        """stream: the caller's own, by its address; 0 for the device's"""
        self.name, self.stream = name, stream
        self.inputs, self.outputs = component.inputs, component.outputs
        self._loaded: Loaded | None = loaded
        loaded.users += 1

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            raise BackendError(f"{self.name} is closed")
        return self._loaded

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        ready = check_feeds(self.name, self.inputs, feeds)
        device = self.loaded.device
        with device.use(self.stream):
            loaded = self.loaded  # it may have been closed while this call waited
            bound = loaded.bound({name: array.shape for name, array in ready.items()})
            for name, array in ready.items():
                bound.tensors[name].array[...] = array
                bound.tensors[name].upload()
            loaded.run(bound)
            for spec in self.outputs:
                bound.tensors[spec.name].download()
            device.synchronize()
            # The next caller of the plan, of this pipeline or another, writes over the arrays.
            return {spec.name: bound.tensors[spec.name].array.copy() for spec in self.outputs}

    def refit(self, weights: Feeds) -> None:
        """Plans take the bundle's own weights and no others: that is what keeps their speed."""
        if weights:
            raise BackendError(
                f"the plan of {self.name} takes no other weights; add them when the bundle is "
                "built (sdrt build --lora), or choose --backend onnxruntime"
            )

    def close(self) -> None:
        with loading:
            loaded, self._loaded = self._loaded, None
            if loaded is None:
                return
            loaded.users -= 1
            if not loaded.users:
                for mark in [mark for mark, value in loaded_plans.items() if value is loaded]:
                    del loaded_plans[mark]
                loaded.close()


class TrtUnet(TrtEngine):
    """A UNet, which also runs a whole schedule as one CUDA graph."""

    def __init__(
        self, name: str, component: Component, loaded: Loaded, target: str, stream: int = 0
    ) -> None:
        super().__init__(name, component, loaded, stream)
        if loaded.loops is None:
            loaded.loops = Loops(loaded, target)

    def run_program(self, schedule: SamplingProgram, encoder: Any, decoder: Any) -> SamplingResult:
        """See `Sampler`."""
        with self.loaded.device.use(self.stream):
            loops = self.loaded.loops
            assert loops is not None
            read = encoder.loaded if schedule.read else None
            drawn: SamplingResult = loops.run(schedule, read, decoder.loaded if decoder else None)
            return drawn
