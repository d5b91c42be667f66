"""CUDA and cuDNN for ONNX Runtime, from the Python packages that have them.

Knows where packages of the `nvidia` namespace put libraries. ONNX Runtime looks in its own
environment only, so it misses those of a torch in another one on `sys.path`; and it prints what it
missed to standard output, which is for results.
"""

import contextlib
import importlib.util
import io
import logging
from pathlib import Path

import onnxruntime as ort

log = logging.getLogger(__name__)


def library_folders() -> list[Path]:
    """The folders of libraries in every `nvidia` package on `sys.path`."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    return [folder for place in places or () for folder in sorted(Path(place).glob("*/lib"))]


def preload_cuda_libraries() -> None:
    """Load the libraries that ONNX Runtime's CUDA provider is linked with; logs what is missing."""
    with contextlib.redirect_stdout(io.StringIO()):
        for folder in library_folders():
            ort.preload_dlls(directory=str(folder))  # also complains of what others have
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    for line in said.getvalue().splitlines():
        log.warning("ONNX Runtime: %s", line)
