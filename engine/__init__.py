"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .gpu import Machine
from .history import History, NumpyHistory
from .lazy import ExclusiveSlot, LazyEngine
from .protocol import Engine, Feeds
from .sampling import ProgramEngine, SamplingProgram, SamplingResult, TextInput
from .selection import BACKENDS, PRECISIONS, Candidate, candidates, choose

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Candidate",
    "Engine",
    "ExclusiveSlot",
    "Feeds",
    "History",
    "LazyEngine",
    "Machine",
    "NumpyHistory",
    "ProgramEngine",
    "SamplingProgram",
    "SamplingResult",
    "TextInput",
    "candidates",
    "choose",
]
