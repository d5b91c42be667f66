"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .gpu import GpuInventory
from .history import History, NumpyHistory
from .lazy import ExclusiveSlot, LazyEngine
from .protocol import Engine, Feeds
from .sampling import ProgramEngine, SamplingProgram, SamplingResult, TextInput
from .selection import BACKENDS, PRECISIONS, Candidate, list_backends, select_backend

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Candidate",
    "Engine",
    "ExclusiveSlot",
    "Feeds",
    "GpuInventory",
    "History",
    "LazyEngine",
    "NumpyHistory",
    "ProgramEngine",
    "SamplingProgram",
    "SamplingResult",
    "TextInput",
    "list_backends",
    "select_backend",
]
