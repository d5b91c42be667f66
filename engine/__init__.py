"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .choose import BACKENDS, PRECISIONS, Candidate, candidates, choose
from .protocol import Engine, Feeds, History, LazyEngine, NumpyHistory

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Candidate",
    "Engine",
    "Feeds",
    "History",
    "LazyEngine",
    "NumpyHistory",
    "candidates",
    "choose",
]
