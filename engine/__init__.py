"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .gpu import Machine
from .history import History, NumpyHistory
from .lazy import LazyEngine, Turn
from .protocol import Engine, Feeds
from .sampling import Drawn, Read, Sampler, Schedule
from .selection import BACKENDS, PRECISIONS, Candidate, candidates, choose

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Candidate",
    "Drawn",
    "Engine",
    "Feeds",
    "History",
    "LazyEngine",
    "Machine",
    "NumpyHistory",
    "Read",
    "Sampler",
    "Schedule",
    "Turn",
    "candidates",
    "choose",
]
