"""One GPU through CUDA's driver interface: memory, a stream, graphs, kernels compiled at run time.

Knows cuda-bindings; not TensorRT, nor what is computed. Everything of a process that uses one GPU
shares one `Device`, its stream and its arena. Never run on a GPU yet.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc

from sdrt.engine.gpu import GPU_LOCK, detect_gpus
from sdrt.errors import BackendError

OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
# After these nothing works in the process until the GPU's context is made anew.
STICKY = {
    driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,
    driver.CUresult.CUDA_ERROR_LAUNCH_FAILED,
    driver.CUresult.CUDA_ERROR_LAUNCH_TIMEOUT,
    driver.CUresult.CUDA_ERROR_MISALIGNED_ADDRESS,
    driver.CUresult.CUDA_ERROR_ILLEGAL_INSTRUCTION,
    driver.CUresult.CUDA_ERROR_ECC_UNCORRECTABLE,
}
KEPT = 2 << 20  # bytes; the arena grows in steps of it


class Device:
    """One GPU's primary context, which TensorRT uses too. Take `use()` around everything.

    broken: what went wrong for good, if anything did; `reset_device` makes the GPU usable again
    arena: address of scratch memory that every component of the process uses in turn
    arena_size: its bytes; `grown` moves it, so that graphs that were captured before are void
    """

    def __init__(self, index: int) -> None:
        """Raises BackendError where there is no such GPU."""
        machine = detect_gpus()
        if index >= len(machine.gpus):
            raise BackendError(machine.unavailable_reason or f"there is no GPU {index}")
        self.index = index
        self.broken: str | None = None
        self.lock = threading.RLock()
        self.arena = self.arena_size = 0
        self.ask(driver.cuInit(0))
        self._handle = self.ask(driver.cuDeviceGet(index))
        self._context = self.ask(driver.cuDevicePrimaryCtxRetain(self._handle))
        self.ask(driver.cuCtxSetCurrent(self._context))
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = self.ask(driver.cuStreamCreate(flags))

    def ask(self, answer: tuple[Any, ...]) -> Any:
        """The values of a driver call; raises BackendError if it failed, and remembers for good
        what cannot be mended.
        """
        status, *values = answer
        if status != driver.CUresult.CUDA_SUCCESS:
            text = f"GPU {self.index}: {status.name}"
            if status == OUT_OF_MEMORY:
                text = f"GPU {self.index} is out of memory{self._numbers()}; make fewer at once"
            if status in STICKY:
                self.broken = text
            raise BackendError(text)
        return values[0] if len(values) == 1 else tuple(values)

    def _numbers(self) -> str:
        status, *values = driver.cuMemGetInfo()
        if status != driver.CUresult.CUDA_SUCCESS:
            return ""
        free, total = values
        return f" ({free / 1e6:,.0f} MB free of {total / 1e6:,.0f})"

    @contextlib.contextmanager
    def use(self, stream: int = 0) -> Iterator[None]:
        """This GPU is this thread's, and no other thread uses it meanwhile.

        stream: the caller's own (a CUstream's address) that all is put into; 0 for the device's
        """
        with self.lock:
            if self.broken:
                raise BackendError(f"{self.broken}; it failed for good: load the pipeline again")
            self.ask(driver.cuCtxSetCurrent(self._context))
            before, self.stream = self.stream, driver.CUstream(stream) if stream else self.stream
            try:
                yield
            finally:
                self.stream = before

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        free, total = self.ask(driver.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        """The address of that many bytes of GPU memory."""
        with GPU_LOCK:
            return int(self.ask(driver.cuMemAlloc(max(size, 1))))

    def free(self, address: int) -> None:
        if address and not self.broken:
            with GPU_LOCK:
                self.ask(driver.cuMemFree(address))

    def grown(self, size: int) -> bool:
        """Make the arena at least so large; returns whether it moved."""
        if size <= self.arena_size:
            return False
        self.synchronize()
        self.free(self.arena)
        self.arena = self.arena_size = 0
        wanted = -(-size // KEPT) * KEPT
        self.arena = self.allocate(wanted)
        self.arena_size = wanted
        return True

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the GPU, in the stream's order."""
        source = array.ctypes.data
        self.ask(driver.cuMemcpyHtoDAsync(address, source, array.nbytes, self.stream))

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU into a contiguous array, in the stream's order."""
        target = array.ctypes.data
        self.ask(driver.cuMemcpyDtoHAsync(target, address, array.nbytes, self.stream))

    def synchronize(self) -> None:
        self.ask(driver.cuStreamSynchronize(self.stream))

    @contextlib.contextmanager
    def capturing(self) -> Iterator["Graph"]:
        """What is put into the stream meanwhile becomes a graph instead of running."""
        with GPU_LOCK:
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            self.ask(driver.cuStreamBeginCapture(self.stream, mode))
            graph = Graph(self)
            try:
                yield graph
            except BaseException:
                driver.cuStreamEndCapture(self.stream)
                raise
            captured = self.ask(driver.cuStreamEndCapture(self.stream))
            try:
                graph.instantiate(captured)
            finally:
                self.ask(driver.cuGraphDestroy(captured))

    def reset(self) -> None:
        """Give everything of this GPU back, whatever state it is in."""
        driver.cuDevicePrimaryCtxReset(self._handle)


class Graph:
    """A sequence of kernels that is launched as one."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._executable: Any = None

    def instantiate(self, captured: Any) -> None:
        self._executable = self._device.ask(driver.cuGraphInstantiate(captured, 0))

    def launch(self) -> None:
        self._device.ask(driver.cuGraphLaunch(self._executable, self._device.stream))

    def close(self) -> None:
        if self._executable is not None and not self._device.broken:
            self._device.ask(driver.cuGraphExecDestroy(self._executable))
        self._executable = None


class Pinned:
    """An array in host memory that the GPU reads and writes directly."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        self._device = device
        count = int(np.prod(shape))
        size = max(count * np.dtype(dtype).itemsize, 1)
        with GPU_LOCK:
            self._address = int(device.ask(driver.cuMemHostAlloc(size, 0)))
        memory = memoryview((ctypes.c_byte * size).from_address(self._address))
        self.array = np.frombuffer(memory, dtype, count=count).reshape(shape)

    def close(self) -> None:
        if self._address and not self._device.broken:
            with GPU_LOCK:
                self._device.ask(driver.cuMemFreeHost(self._address))
        self._address = 0


class Mirrored:
    """An array in pinned host memory and its room on the GPU; copies go in the stream's order, and
    both addresses stay, so that a graph may hold the copies too.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        self._device = device
        self._host = Pinned(device, shape, dtype)
        self.array = self._host.array
        try:
            self.address = device.allocate(self.array.nbytes)
        except BackendError:
            self._host.close()
            raise

    def upload(self) -> None:
        self._device.upload(self.address, self.array)

    def download(self) -> None:
        self._device.download(self.array, self.address)

    def close(self) -> None:
        self._device.free(self.address)
        self._host.close()
        self.address = 0


_devices: dict[int, Device] = {}


def device_of(index: int) -> Device:
    """The process's one `Device` of a GPU."""
    with GPU_LOCK:  # or two threads might each get one of their own, with a lock each
        if index not in _devices:
            _devices[index] = Device(index)
        return _devices[index]


def reset_device(index: int) -> None:
    """Forget a GPU that is broken, so that it can be used anew; what lives on it is lost."""
    with GPU_LOCK:
        device_of(index).reset()
        _devices.clear()


def compiled(source: str, target: str) -> bytes:
    """Machine code of CUDA source for a compute capability such as sm_89; needs no GPU.

    Raises BackendError with the compiler's words.
    """
    program = _made(nvrtc.nvrtcCreateProgram(source.encode(), b"sdrt.cu", 0, [], []))
    options = [f"--gpu-architecture={target}".encode(), b"--fmad=true"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        text = bytearray(_made(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, text)
        raise BackendError(f"the kernel does not compile for {target}: {text.decode()}")
    code = bytearray(_made(nvrtc.nvrtcGetCUBINSize(program)))
    _made(nvrtc.nvrtcGetCUBIN(program, code))
    _made(nvrtc.nvrtcDestroyProgram(program))
    return bytes(code)


def _made(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC failed: {status.name}")
    return values[0] if values else None
