"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .choose import BACKENDS, Candidate, candidates, choose
from .protocol import Engine, History, LazyEngine, NumpyHistory

__all__ = [
    "BACKENDS",
    "Candidate",
    "Engine",
    "History",
    "LazyEngine",
    "NumpyHistory",
    "candidates",
    "choose",
]
