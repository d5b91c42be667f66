"""Components on TensorRT and on TensorRT for RTX, one code path for both.

Knows loaded plans; not how one is bound. Not yet run on a GPU.
"""

from typing import Any

import numpy as np

from sdrt.bundle.manifest import Component
from sdrt.engine.protocol import Feeds, check_feeds
from sdrt.engine.sampling import SamplingProgram, SamplingResult
from sdrt.errors import BackendError

from .loaded_plan import LoadedPlan, loaded_plans
from .sampling_graph import SamplingGraphCache


class TrtEngine:
    """One component of one pipeline."""

    def __init__(self, name: str, component: Component, plan: LoadedPlan, stream: int = 0) -> None:
        """stream: the address of the caller's own; 0 for the device's"""
        self.name, self.stream = name, stream
        self.inputs, self.outputs = component.inputs, component.outputs
        self._plan: LoadedPlan | None = plan

    @property
    def plan(self) -> LoadedPlan:
        if self._plan is None:
            raise BackendError(f"{self.name} is closed")
        return self._plan

    @property
    def max_rows(self) -> int:
        """Most rows of a call, by the plan's profiles."""
        first = self.inputs[0].name
        return max(profile[first][2][0] for profile in self.plan.plan.key.profiles)

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        arrays = check_feeds(self.name, self.inputs, feeds)
        device = self.plan.device
        with device.use(self.stream):
            plan = self.plan  # it may have been closed while this call waited
            binding = plan.bind({name: array.shape for name, array in arrays.items()})
            for name, array in arrays.items():
                binding.tensors[name].array[...] = array
                binding.tensors[name].upload()
            plan.run(binding)
            for spec in self.outputs:
                binding.tensors[spec.name].download()
            device.synchronize()
            # The plan's next caller, of any pipeline, writes over these arrays.
            return {spec.name: binding.tensors[spec.name].array.copy() for spec in self.outputs}

    def refit(self, weights: Feeds) -> None:
        """See `Engine.refit`; for plans that were built with `--switch-lora`."""
        with self.plan.device.use(self.stream):
            self.plan.refit(weights)

    def close(self) -> None:
        plan, self._plan = self._plan, None
        if plan is not None:
            loaded_plans.release(plan)


class TrtUnet(TrtEngine):
    """A UNet, which also runs complete sampling programs as one CUDA graph."""

    def run_program(self, program: SamplingProgram, encoder: Any, decoder: Any) -> SamplingResult:
        """See `ProgramEngine`; encoder and decoder are TensorRT engines."""
        with self.plan.device.use(self.stream):
            graphs: SamplingGraphCache | None = self.plan.sampling_graphs
            assert graphs is not None
            text_encoder = encoder.plan if program.text else None
            return graphs.run(program, text_encoder, decoder.plan if decoder else None)
