"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .choose import BACKENDS, PRECISIONS, Candidate, candidates, choose
from .protocol import Engine, History, LazyEngine, NumpyHistory

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Candidate",
    "Engine",
    "History",
    "LazyEngine",
    "NumpyHistory",
    "candidates",
    "choose",
]
