"""Components on ONNX Runtime. Knows onnxruntime; imported only when this backend is chosen."""

import logging
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort

from sdrt.bundle import Component
from sdrt.errors import BackendError

from .protocol import Feeds, checked_feeds

log = logging.getLogger(__name__)


def available(provider: str) -> str | None:
    """None if the provider can be used, else why not."""
    if provider in ort.get_available_providers():
        return None
    have = ", ".join(ort.get_available_providers())
    return f"this onnxruntime has no {provider} (it has {have}); pip install onnxruntime-gpu"


def session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    # Spinning workers burn a core between calls; evaluations are long enough to wake them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class OrtEngine:
    """One session; inputs and outputs are bound, not copied, where the provider is the CPU."""

    def __init__(self, name: str, graph: Path, component: Component, provider: str) -> None:
        self.name = name
        self.inputs, self.outputs = component.inputs, component.outputs
        try:
            self._session: ort.InferenceSession | None = ort.InferenceSession(
                str(graph), session_options(), providers=[provider]
            )
        except Exception as error:  # onnxruntime raises its own, undocumented classes
            raise BackendError(f"ONNX Runtime cannot load {graph}: {error}") from error
        if provider not in self._session.get_providers():
            raise BackendError(
                f"ONNX Runtime fell back from {provider} to "
                f"{', '.join(self._session.get_providers())} for {name}; "
                "type sdrt doctor, or choose --backend onnxruntime on the CPU"
            )
        self._binding = self._session.io_binding()

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        if self._session is None:
            raise BackendError(f"{self.name} is closed")
        for name, array in checked_feeds(self.name, self.inputs, feeds).items():
            self._binding.bind_cpu_input(name, array)
        for spec in self.outputs:
            self._binding.bind_output(spec.name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # as above
            raise BackendError(f"ONNX Runtime failed in {self.name}: {error}") from error
        values = self._binding.get_outputs()
        return {s.name: v.numpy() for s, v in zip(self.outputs, values, strict=True)}

    def close(self) -> None:
        self._session = None
        self._binding = None
