"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .choose import BACKENDS, PRECISIONS, Candidate, candidates, choose
from .gpus import Machine
from .protocol import Engine, Feeds, History, LazyEngine, NumpyHistory, Sampler, Schedule

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Candidate",
    "Engine",
    "Feeds",
    "History",
    "LazyEngine",
    "Machine",
    "NumpyHistory",
    "Sampler",
    "Schedule",
    "candidates",
    "choose",
]
