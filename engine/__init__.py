"""One compiled component on one backend: ONNX Runtime or torch. See `protocol.py`."""

from .choose import BACKENDS, Candidate, candidates, choose
from .protocol import Engine, History, NumpyHistory

__all__ = ["BACKENDS", "Candidate", "Engine", "History", "NumpyHistory", "candidates", "choose"]
