"""The NVIDIA GPUs of this machine and what their driver can do, asked from the driver itself.

Knows the driver's C interface through ctypes, so that no package is needed and no context is made;
not which backend wants what.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = (
    75,
    76,
)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
# Held by whatever captures or allocates on a GPU: an allocation by one thread can void what another
# captures, whichever backend either belongs to.
GPU_LOCK = threading.RLock()


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. sm: its compute capability, such as sm_89; memory: bytes in all"""

    index: int
    name: str
    sm: str
    memory: int
    pci_bus_id: str = ""


@dataclass(frozen=True, slots=True)
class GpuInventory:
    """GPUs in the order in which CUDA numbers them.

    cuda: the newest CUDA that the driver serves, such as (13, 0); None without a driver
    driver: the driver's own version, such as 580.65.06
    why_none: why there is no GPU, in words a person can act on; None if there is one
    """

    gpus: tuple[Gpu, ...] = ()
    cuda_version: tuple[int, int] | None = None
    driver_version: str | None = None
    unavailable_reason: str | None = None


@functools.cache
def detect_gpus() -> GpuInventory:
    """What is here; asked once."""
    cuda = _load_library("libcuda.so.1")
    if cuda is None:
        seen = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/nvhost-gpu").exists()
        missing = "an NVIDIA GPU without libcuda.so.1; install its driver"
        return GpuInventory(unavailable_reason=missing if seen else "no NVIDIA GPU on this machine")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    served = (version.value // 1000, version.value % 1000 // 10)
    status = cuda.cuInit(0)
    gpus = _list_gpus(cuda) if status == 0 else ()
    reason = None if gpus else explain_no_gpu(status, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return GpuInventory(gpus, served, _query_driver_version(), reason)


def explain_no_gpu(status: int, visible: str | None) -> str:
    """Why the driver shows no GPU; status: what cuInit returned, 0 if it counts none."""
    if visible is not None and status in (0, NO_DEVICE):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU; unset it or name one"
    if status in (0, NO_DEVICE):
        return "the NVIDIA driver finds no GPU; type nvidia-smi"
    return f"the NVIDIA driver does not start (CUDA error {status}); type nvidia-smi"


def _list_gpus(cuda: Any) -> tuple[Gpu, ...]:
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_describe_gpu(cuda, index) for index in range(count.value))


def _describe_gpu(cuda: Any, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetPCIBusId(bus, len(bus), device)
    sm = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        sm.append(value.value)
    text = f"sm_{sm[0]}{sm[1]}"
    return Gpu(index, name.value.decode(), text, memory.value, bus.value.decode())


def _load_library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _query_nvml(query: Callable[[Any], Any]) -> Any:
    """An answer of NVIDIA's management library, or None where it has none."""
    nvml = _load_library("libnvidia-ml.so.1")
    if nvml is None or nvml.nvmlInit_v2():
        return None
    try:
        return query(nvml)
    finally:
        nvml.nvmlShutdown()


def _query_driver_version() -> str | None:
    def query(nvml: Any) -> str | None:
        text = ctypes.create_string_buffer(80)
        failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
        return None if failed else text.value.decode()

    answer: str | None = _query_nvml(query)
    return answer


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong)]
    _fields_ += [("used", ctypes.c_ulonglong)]


def free_memory(gpu: Gpu) -> int | None:
    """Bytes that nobody uses now, by the management library; None where it does not say."""

    def query(nvml: Any) -> int | None:
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(gpu.pci_bus_id.encode(), ctypes.byref(handle)):
            return None
        return None if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) else memory.free

    answer: int | None = _query_nvml(query)
    return answer
