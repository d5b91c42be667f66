"""One GPU through CUDA's driver API: memory, a stream and graphs.

Knows cuda-bindings; not TensorRT, nor what is computed. Everything in a process that uses one GPU
shares one `Device`, its stream and its arena. Not yet run on a GPU.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from cuda.bindings import driver

from sdrt.engine.gpu import GPU_LOCK, detect_gpus
from sdrt.errors import BackendError, DeviceLostError

OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
# "This leaves the process in an inconsistent state and any further CUDA work will return the same
# error. To continue using CUDA, the process must be terminated and relaunched."
STICKY = {
    status
    for name in (
        "ASSERT",
        "CONTAINED",
        "CONTEXT_IS_DESTROYED",
        "ECC_UNCORRECTABLE",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_CONTEXT",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
        "NVLINK_UNCORRECTABLE",
        "UNKNOWN",
    )
    if (status := getattr(driver.CUresult, f"CUDA_ERROR_{name}", None)) is not None
}
RESTART = "restart the process: CUDA serves no other context in this one"
ARENA_STEP = 2 << 20  # bytes by which the arena grows


class Device:
    """One GPU's primary context, which TensorRT uses too. Enter `use()` around everything.

    Attributes:
        fatal_error: The sticky error that made the context unusable, if any. It is not reset: that
            would also destroy what other libraries have in it, and CUDA promises nothing after it.
        arena: Address of the scratch memory that all components of the process share.
        arena_size: Its bytes.
        arena_version: Raised by every change of the arena, which invalidates captured graphs. An
            address is no such mark: another arena may get the same one.
    """

    def __init__(self, index: int) -> None:
        """Raises BackendError where there is no such GPU."""
        gpus = detect_gpus()
        if index >= len(gpus.gpus):
            raise BackendError(gpus.unavailable_reason or f"there is no GPU {index}")
        self.index = index
        self.fatal_error: str | None = None
        self.lock = threading.RLock()
        self.arena = self.arena_size = self.arena_version = 0
        self.check(driver.cuInit(0))
        self._handle = self.check(driver.cuDeviceGet(index))
        self._context = self.check(driver.cuDevicePrimaryCtxRetain(self._handle))
        self.check(driver.cuCtxSetCurrent(self._context))
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = self.check(driver.cuStreamCreate(flags))

    def check(self, result: tuple[Any, ...]) -> Any:
        """The values that a driver call returned.

        Raises:
            BackendError: The call failed.
            DeviceLostError: It failed for good, which is recorded.
        """
        status, *values = result
        if status != driver.CUresult.CUDA_SUCCESS:
            text, hint = f"GPU {self.index}: {status.name}", None
            if status == OUT_OF_MEMORY:
                text = f"GPU {self.index} is out of memory{self._describe_memory()}"
                hint = "generate fewer images at once"
            if status in STICKY:
                self.fatal_error = self.fatal_error or text
                raise DeviceLostError(text, hint=RESTART)
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
            self.check_usable()
            self.check(driver.cuCtxSetCurrent(self._context))
            previous, self.stream = self.stream, driver.CUstream(stream) if stream else self.stream
            try:
                yield
            finally:
                self.stream = previous

    def check_usable(self) -> None:
        """Raise DeviceLostError after a sticky error."""
        if self.fatal_error:
            raise DeviceLostError(f"{self.fatal_error}; the GPU's context is lost", hint=RESTART)

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

    def grow_arena(self, size: int) -> None:
        """Make the arena at least this large, and never empty."""
        if self.arena and size <= self.arena_size:
            return
        self.free_arena()
        rounded = max(1, -(-size // ARENA_STEP)) * ARENA_STEP
        self.arena = self.allocate(rounded)
        self.arena_size = rounded

    def free_arena(self) -> None:
        """Give the arena's memory back; the next call of a plan takes it again."""
        self.synchronize()
        address, self.arena = self.arena, 0
        self.arena_size = 0
        self.arena_version += 1
        self.free(address)

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
                _, captured = driver.cuStreamEndCapture(self.stream)
                self._destroy_captured(captured)
                raise
            captured = self.check(driver.cuStreamEndCapture(self.stream))
            try:
                graph.instantiate(captured)
            finally:
                self._destroy_captured(captured)

    def _destroy_captured(self, captured: Any) -> None:
        """The answer may be an error of earlier work, which the next call has too: raising it here
        would lose the graph that was made.
        """
        if int(captured or 0) and not self.fatal_error:
            driver.cuGraphDestroy(captured)


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
        executable, self._executable = self._executable, None
        if executable is not None and not self._device.fatal_error:
            self._device.check(driver.cuGraphExecDestroy(executable))


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


def keep_for_ever(value: object) -> None:
    """Let no destructor run, at the interpreter's exit neither."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
