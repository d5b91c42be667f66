"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .gpu import Machine
from .protocol import (
    Drawn,
    Engine,
    Feeds,
    History,
    LazyEngine,
    NumpyHistory,
    Read,
    Sampler,
    Schedule,
    Turn,
)
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
