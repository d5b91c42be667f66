"""The two kinds of TensorRT: their packages, the GPUs they serve, and what is missing here.

Knows both packages by name, and loads one when it is asked for; nothing of plans.
"""

import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sdrt.engine.cuda.compiler import explain_unavailable as explain_missing_compiler
from sdrt.engine.gpu import GpuInventory
from sdrt.errors import BackendError

RTX, FULL = "tensorrt-rtx", "tensorrt"
MODULES = {FULL: "tensorrt", RTX: "tensorrt_rtx"}
INSTALL = {FULL: "pip install 'sdrt[gpu]'", RTX: "pip install 'sdrt[rtx]'"}
# What TensorRT for RTX compiles for; a test compares it with the package's own list.
RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
PORTABLE = RTX_TARGETS[1:]  # Turing refuses products in single precision, so it is asked for

OLDEST = 75  # compute capability that TensorRT 10.5 and later serve
ATTENTION_SINCE = (10, 14)
log = logging.getLogger(__name__)


def explain_unavailable(kind: str, gpus: GpuInventory, index: int = 0) -> str | None:
    """Why a kind of TensorRT cannot run on a GPU of the machine; None if it can."""
    if gpus.unavailable_reason:
        return gpus.unavailable_reason
    for module in (MODULES[kind], "cuda.bindings"):
        if not _is_installed(module):
            return f"{module} is not installed; {INSTALL[kind]}"
    gpu, required = gpus.gpus[index], required_cuda(kind)
    number = int(gpu.sm.removeprefix("sm_"))
    if kind == RTX and gpu.sm not in RTX_TARGETS:
        return f"TensorRT for RTX serves {', '.join(RTX_TARGETS)}; {gpu.name} is {gpu.sm}"
    if number < OLDEST:
        return f"TensorRT serves sm_{OLDEST} and later; {gpu.name} is {gpu.sm}"
    if required and gpus.cuda_version and gpus.cuda_version[0] < required:
        served = ".".join(map(str, gpus.cuda_version))
        return (
            f"the driver {gpus.driver_version or ''} serves CUDA {served}, "
            f"this {kind} needs {required}.0; update the NVIDIA driver"
        )
    return explain_missing_compiler(gpus.cuda_version)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package's part, when the package is missing
        return False


def required_cuda(kind: str) -> int | None:
    """The major version of CUDA that the installed package was made for, by its wheels' names."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, rarely needed

    for major in (13, 12):
        try:
            version(f"{MODULES[kind]}_cu{major}_libs")
        except PackageNotFoundError:
            continue
        return major
    return None


def load_module(kind: str) -> ModuleType:
    """The Python module of a kind; raises BackendError if it does not import."""
    try:
        return importlib.import_module(MODULES[kind])
    except (ImportError, OSError) as error:
        raise BackendError(f"{kind} cannot be imported: {error}; {INSTALL[kind]}") from error


@dataclass(frozen=True, slots=True)
class Features:
    """What this package looks for in TensorRT that not every version from 10.3 on has.

    Attributes:
        attention: It parses opset 23 with `Attention`, and has `IAttention`.
        asks_capturable: A context tells whether its calls can be captured into a CUDA graph.
    """

    attention: bool
    asks_capturable: bool


def get_features(trt: Any) -> Features:
    """The features of a TensorRT module of either kind, by its name and version."""
    rtx = trt.__name__ == MODULES[RTX]
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    return Features(attention=rtx or version >= ATTENTION_SINCE, asks_capturable=rtx)


@functools.cache
def get_logger(trt: Any) -> Any:
    """TensorRT's messages go to `logging`; the latest errors are kept. One for the whole process,
    since TensorRT wants it to outlive everything else.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors = [*self.errors[-2:], message]
            log.debug("%s", message)

    return Logger()
