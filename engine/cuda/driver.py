"""One GPU through CUDA's driver API: memory, a stream, graphs, and kernels compiled at run time.

Knows cuda-bindings; not TensorRT, nor what is computed. Everything in a process that uses one GPU
shares one `Device`, its stream and its arena. Not yet run on a GPU.
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
# Errors that leave the context unusable.
STICKY = {
    driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,
    driver.CUresult.CUDA_ERROR_LAUNCH_FAILED,
    driver.CUresult.CUDA_ERROR_LAUNCH_TIMEOUT,
    driver.CUresult.CUDA_ERROR_MISALIGNED_ADDRESS,
    driver.CUresult.CUDA_ERROR_ILLEGAL_INSTRUCTION,
    driver.CUresult.CUDA_ERROR_ECC_UNCORRECTABLE,
}
ARENA_STEP = 2 << 20  # bytes by which the arena grows


class Device:
    """One GPU's primary context, which TensorRT uses too. Enter `use()` around everything.

    Attributes:
        fatal_error: The sticky error that made the context unusable, if any; see `reset_device`.
        arena: Address of the scratch memory that all components of the process share.
        arena_size: Its bytes. `grow_arena` moves it, which invalidates captured graphs.
    """

    def __init__(self, index: int) -> None:
        """Raises BackendError where there is no such GPU."""
        gpus = detect_gpus()
        if index >= len(gpus.gpus):
            raise BackendError(gpus.unavailable_reason or f"there is no GPU {index}")
        self.index = index
        self.fatal_error: str | None = None
        self.lock = threading.RLock()
        self.arena = self.arena_size = 0
        self.check(driver.cuInit(0))
        self._handle = self.check(driver.cuDeviceGet(index))
        self._context = self.check(driver.cuDevicePrimaryCtxRetain(self._handle))
        self.check(driver.cuCtxSetCurrent(self._context))
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = self.check(driver.cuStreamCreate(flags))

    def check(self, result: tuple[Any, ...]) -> Any:
        """The values that a driver call returned; raises BackendError if it failed, and records a
        sticky error.
        """
        status, *values = result
        if status != driver.CUresult.CUDA_SUCCESS:
            text, hint = f"GPU {self.index}: {status.name}", None
            if status == OUT_OF_MEMORY:
                text = f"GPU {self.index} is out of memory{self._describe_memory()}"
                hint = "generate fewer images at once"
            if status in STICKY:
                self.fatal_error = text
            raise BackendError(text, hint=hint)
        return values[0] if len(values) == 1 else tuple(values)

    def _describe_memory(self) -> str:
        status, *values = driver.cuMemGetInfo()
        if status != driver.CUresult.CUDA_SUCCESS:
            return ""
        free, total = values
        return f" ({free / 1e6:,.0f} MB free of {total / 1e6:,.0f})"

    @contextlib.contextmanager
    def use(self, stream: int = 0) -> Iterator[None]:
        """Make the GPU current for this thread, and exclude other threads meanwhile.

        stream: the address of the caller's CUstream to work in; 0 for the device's own
        """
        with self.lock:
            if self.fatal_error:
                raise BackendError(
                    f"{self.fatal_error}; the GPU's context is lost", hint="load the pipeline again"
                )
            self.check(driver.cuCtxSetCurrent(self._context))
            previous, self.stream = self.stream, driver.CUstream(stream) if stream else self.stream
            try:
                yield
            finally:
                self.stream = previous

    def memory(self) -> tuple[int, int]:
        """Bytes free and in total."""
        free, total = self.check(driver.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        """Allocate GPU memory; returns its address."""
        with GPU_LOCK:
            return int(self.check(driver.cuMemAlloc(max(size, 1))))

    def free(self, address: int) -> None:
        if address and not self.fatal_error:
            with GPU_LOCK:
                self.check(driver.cuMemFree(address))

    def grow_arena(self, size: int) -> bool:
        """Make the arena at least this large; returns whether it moved."""
        if size <= self.arena_size:
            return False
        self.synchronize()
        self.free(self.arena)
        self.arena = self.arena_size = 0
        rounded = -(-size // ARENA_STEP) * ARENA_STEP
        self.arena = self.allocate(rounded)
        self.arena_size = rounded
        return True

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the GPU, in the stream's order."""
        source = array.ctypes.data
        self.check(driver.cuMemcpyHtoDAsync(address, source, array.nbytes, self.stream))

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU into a contiguous array, in the stream's order."""
        target = array.ctypes.data
        self.check(driver.cuMemcpyDtoHAsync(target, address, array.nbytes, self.stream))

    def synchronize(self) -> None:
        self.check(driver.cuStreamSynchronize(self.stream))

    @contextlib.contextmanager
    def capture(self) -> Iterator["CudaGraph"]:
        """Capture what is put into the stream into a graph instead of running it."""
        with GPU_LOCK:
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            self.check(driver.cuStreamBeginCapture(self.stream, mode))
            graph = CudaGraph(self)
            try:
                yield graph
            except BaseException:
                driver.cuStreamEndCapture(self.stream)
                raise
            captured = self.check(driver.cuStreamEndCapture(self.stream))
            try:
                graph.instantiate(captured)
            finally:
                self.check(driver.cuGraphDestroy(captured))

    def reset(self) -> None:
        """Destroy the primary context, whatever state it is in."""
        driver.cuDevicePrimaryCtxReset(self._handle)


class CudaGraph:
    """A captured sequence of kernels and copies, launched as one."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._executable: Any = None

    def instantiate(self, captured: Any) -> None:
        self._executable = self._device.check(driver.cuGraphInstantiate(captured, 0))

    def launch(self) -> None:
        self._device.check(driver.cuGraphLaunch(self._executable, self._device.stream))

    def close(self) -> None:
        if self._executable is not None and not self._device.fatal_error:
            self._device.check(driver.cuGraphExecDestroy(self._executable))
        self._executable = None


class PinnedArray:
    """An array in page-locked host memory, which the GPU copies from and to directly."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        self._device = device
        count = int(np.prod(shape))
        size = max(count * np.dtype(dtype).itemsize, 1)
        with GPU_LOCK:
            self._address = int(device.check(driver.cuMemHostAlloc(size, 0)))
        memory = memoryview((ctypes.c_byte * size).from_address(self._address))
        self.array = np.frombuffer(memory, dtype, count=count).reshape(shape)

    def close(self) -> None:
        if self._address and not self._device.fatal_error:
            with GPU_LOCK:
                self._device.check(driver.cuMemFreeHost(self._address))
        self._address = 0


class MirroredBuffer:
    """An array in pinned host memory and a buffer of its size on the GPU. Copies follow the
    stream's order; both addresses are fixed, so that a graph can contain the copies.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        self._device = device
        self._host = PinnedArray(device, shape, dtype)
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


def get_device(index: int) -> Device:
    """The process's one `Device` of a GPU."""
    with GPU_LOCK:  # or two threads could create one each, with a lock each
        if index not in _devices:
            _devices[index] = Device(index)
        return _devices[index]


def reset_device(index: int) -> None:
    """Reset a GPU after a sticky error, so that it can be used again; its memory is lost."""
    with GPU_LOCK:
        get_device(index).reset()
        _devices.clear()


def compile_cuda(source: str, target: str) -> bytes:
    """Compile CUDA source to a cubin for a compute capability such as sm_89; needs no GPU.

    Raises BackendError with the compiler's log.
    """
    program = _check_nvrtc(nvrtc.nvrtcCreateProgram(source.encode(), b"sdrt.cu", 0, [], []))
    options = [f"--gpu-architecture={target}".encode(), b"--fmad=true"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_check_nvrtc(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f"a kernel failed to compile for {target}: {log.decode()}")
    code = bytearray(_check_nvrtc(nvrtc.nvrtcGetCUBINSize(program)))
    _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, code))
    _check_nvrtc(nvrtc.nvrtcDestroyProgram(program))
    return bytes(code)


def _check_nvrtc(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC failed: {status.name}")
    return values[0] if values else None
