"""Compiled components on ONNX Runtime, OpenVINO, TensorRT and PyTorch; see `protocol.py`."""

from .gpu import GpuInventory
from .history import History, NumpyHistory, find_ranges
from .lazy import ExclusiveSlot, LazyEngine
from .load_options import LoadOptions
from .protocol import Engine, Feeds
from .sampling import ProgramEngine, SamplingProgram, SamplingResult, TextInput
from .selection import BACKENDS, PRECISIONS, Candidate, list_backends, log_selection, select_backend

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
    "LoadOptions",
    "NumpyHistory",
    "ProgramEngine",
    "SamplingProgram",
    "SamplingResult",
    "TextInput",
    "find_ranges",
    "list_backends",
    "log_selection",
    "select_backend",
]
