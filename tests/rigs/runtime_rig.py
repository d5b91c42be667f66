"""A strict stand-in of the runtime half of TensorRT for RTX: engines, contexts, refitting. What an
engine computes is handed in as an `Arithmetic`; everything else uses the CUDA driver, so that it
runs on a GPU as it does on the driver's stand-in (`driver_rig`).

It shows that contexts are set up in TensorRT's order, that tensors and scratch memory are large
enough, aligned and alive, that nothing is captured before a run outside the capture, that nobody
reads scratch memory that another component wrote, that weights are refitted while nothing runs, and
that objects are released in order.

It does NOT show that TensorRT itself accepts the calls, what it computes, how long it takes or how
much memory it needs: its documentation was read, and is imitated at its strictest. Nothing here has
run in TensorRT, nor does a passing test mean that TensorRT ran on a GPU.
"""

import enum
import json
import sys
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from cuda.bindings import driver

ALIGNMENT = 256
SCRIBBLE = 0xFE  # NaN in both precisions
problems: list[str] = []  # what TensorRT does not allow, in this process
live = {"engines": 0, "contexts": 0}


def report(problem: str) -> None:
    problems.append(problem)
    sys.stderr.write(f"[rig] {problem}\n")


def ask(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise RuntimeError(f"the driver answers {status.name}")  # as pybind passes it on
    return values[0] if len(values) == 1 else tuple(values)


def extent(address: int) -> int:
    """Bytes of device memory from an address to the end of its block; 0 outside of all."""
    status, *values = driver.cuMemGetAddressRange(address)
    return 0 if int(status) else int(values[0]) + int(values[1]) - address


class Arithmetic(Protocol):
    """What an engine computes. dtypes: of all inputs, then outputs, by name."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """From the shapes of the inputs."""
        ...

    def enqueue(
        self, stream: int, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Put one call into a stream."""
        ...

    def prototype(self, name: str) -> tuple[str, int]:
        """A weight's dtype and count."""
        ...

    def refit(self, weights: Mapping[str, tuple[str, int, int]]) -> None:
        """Replace weights: dtype, address of memory, and count, by name."""
        ...


class ILogger:
    VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = range(5)


class DataType(enum.Enum):
    FLOAT, HALF = "float32", "float16"


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class Weights:
    """Of an array, which it does not copy, or of memory."""

    def __init__(self, of: np.ndarray | DataType, address: int = 0, count: int = 0) -> None:
        if isinstance(of, DataType):
            self.dtype, self.address, self.size = of, address, count
            return
        if not of.flags.c_contiguous or not of.flags.aligned:
            report("weights that are not contiguous or not aligned")
        self.dtype, self.address, self.size = DataType(of.dtype.name), of.ctypes.data, of.size
        self.array = weakref.ref(of)

    @property
    def is_gone(self) -> bool:
        """Whether the array that it is of was released."""
        return self.address == 0 or (hasattr(self, "array") and self.array() is None)


class RuntimeCache:
    def __init__(self) -> None:
        self.kernels = b""

    def deserialize(self, content: bytes) -> bool:
        self.kernels = bytes(content)
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.kernels or b"none")


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = ExecutionContextAllocationStrategy(strategy)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Engine:
    """plan: its profiles, and the flags `stripped`, `streamed`, `user_allocation`"""

    streamable_weights_size = 1000

    def __init__(self, plan: Mapping[str, Any], create: Callable[[], Arithmetic]) -> None:
        self.plan, self._create = plan, create
        self.arithmetic = None if plan["stripped"] else create()
        self.contexts = self.refits = self._budget = 0
        self.streams: set[int] = set()  # that may have work of this engine
        live["engines"] += 1

    def __del__(self) -> None:
        live["engines"] -= 1
        if self.contexts:
            report("an engine is destroyed before its contexts")

    def fill(self) -> None:
        self.arithmetic = self._create()

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        if self.contexts:
            report("the budget of streamed weights is set while there are contexts")
        if not self.plan["streamed"]:
            report("a budget of streamed weights for a plan without them")
        self._budget = value

    def get_weight_streaming_automatic_budget(self) -> int:
        return 500

    def create_engine_inspector(self) -> Any:
        text = json.dumps({"Layers": []})
        return SimpleNamespace(get_engine_information=lambda format: text)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> "Context | None":
        if self.arithmetic is None:
            report("a context of an engine without weights")
        managed = config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if managed == bool(self.plan["streamed"]):
            report(f"streamed weights: {self.plan['streamed']}, user-managed memory: {managed}")
        return Context(self, config, managed)


class Context:
    """Calls of one engine for one set of shapes."""

    def __init__(self, engine: Engine, config: RuntimeConfig, managed: bool) -> None:
        self.engine, self.cache, self.managed = engine, config.cache, managed
        engine.contexts += 1
        live["contexts"] += 1
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory, self.memory_size, self.required = 0, -1, -1
        self.warm_for: tuple[Any, ...] = ()

    def __del__(self) -> None:
        self.engine.contexts -= 1
        live["contexts"] -= 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if self.shapes:
            report("a profile is selected after shapes were set")
        if index >= len(self.engine.plan["profiles"]):
            return False
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None:
            report("a shape is set without a profile")
            return False
        low, _, high = self.engine.plan["profiles"][self.profile][name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        assert self.engine.arithmetic is not None
        missing = [name for name in self.engine.arithmetic.inputs if name not in self.shapes]
        if not missing:
            self.shapes |= self.engine.arithmetic.output_shapes(self.shapes)
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        if not address or address % ALIGNMENT:
            report(f"the address of {name} is {address:#x}")
            return False
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if not self.managed:
            report("the size of memory is asked for that the context owns")
        elements = sum(int(np.prod(shape)) for shape in self.shapes.values())
        self.required = -(-elements * 40 // ALIGNMENT) * ALIGNMENT
        return self.required

    def set_device_memory(self, address: int, size: int) -> None:
        if not self.managed:
            report("memory is set in a context that owns its own")
        if self.required < 0:
            report("memory is set before its size was asked for")
        if not address or address % ALIGNMENT or not self.required <= size <= extent(address):
            report(f"{size} bytes at {address:#x} as memory, {self.required} are required")
        self.memory, self.memory_size = address, size

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self.engine.plan["user_allocation"])

    def execute_async_v3(self, stream: int) -> bool:
        engine, stream = self.engine, int(stream)
        assert engine.arithmetic is not None
        if not stream or (self.managed and not self.memory):
            report("a call without a stream or without memory")
            return False
        state = (stream, engine.refits, self.memory, tuple(self.addresses.items()))
        if int(ask(driver.cuStreamIsCapturing(stream))):
            if self.warm_for != state:
                report("a call is captured before one ran outside of the capture")
                return False
            if not engine.plan["user_allocation"]:
                driver.cuMemAlloc(1)  # which a capture does not survive
        elif not self._is_backed():
            return False
        self.warm_for = state
        self.engine.streams.add(stream)
        if self.cache is not None:
            self.cache.kernels = b"compiled"
        engine.arithmetic.enqueue(stream, dict(self.addresses), dict(self.shapes))
        if self.managed and self.required:
            ask(driver.cuMemsetD8Async(self.memory, SCRIBBLE, self.required, stream))
        return True

    def _is_backed(self) -> bool:
        """Whether there is memory behind every address."""
        assert self.engine.arithmetic is not None
        dtypes = {**self.engine.arithmetic.inputs, **self.engine.arithmetic.outputs}
        for name, dtype in dtypes.items():
            size = int(np.prod(self.shapes[name])) * np.dtype(dtype).itemsize
            if extent(self.addresses.get(name, 0)) < size:
                report(f"{name} has {size} bytes, its memory less")
                return False
        if self.managed and extent(self.memory) < self.required:
            report("the memory of a context is gone")
            return False
        return True


class Refitter:
    """Weights that were fused are refitted together, or not at all: here those of one block. No
    weight is replaced that was not marked, nor while anything of the engine is pending, in whatever
    stream.
    """

    def __init__(self, engine: Engine, logger: Any) -> None:
        if not engine.plan["stripped"] and not engine.plan["refittable"]:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.engine = engine
        self._weights: dict[str, tuple[Weights, TensorLocation]] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.plan["refittable"])

    def _block(self, name: str) -> str:
        return name.rpartition(".to_")[0] or name

    def get_missing_weights(self) -> list[str]:
        touched = {self._block(name) for name in self._weights}
        together = [name for name in self.get_all_weights() if self._block(name) in touched]
        return [name for name in together if name not in self._weights]

    def set_named_weights(
        self, name: str, weights: Weights, location: TensorLocation = TensorLocation.HOST
    ) -> bool:
        assert self.engine.arithmetic is not None
        if name not in self.get_all_weights():
            return False
        if (weights.dtype.value, weights.size) != self.engine.arithmetic.prototype(name):
            return False
        size = weights.size * np.dtype(weights.dtype.value).itemsize
        if (location is TensorLocation.DEVICE) != bool(extent(weights.address)):
            report(f"{name}: {weights.address:#x} is not where it is said to be")
            return False
        if location is TensorLocation.DEVICE and extent(weights.address) < size:
            report(f"{name}: no {size} bytes of the device at {weights.address:#x}")
            return False
        self._weights[name] = weights, location
        return True

    def refit_cuda_engine(self) -> bool:
        if self._weights:
            report("weights are refitted without a stream")
        self.engine.fill()
        return True

    def refit_cuda_engine_async(self, stream: int) -> bool:
        for other in self.engine.streams | {int(stream)}:
            if int(driver.cuStreamQuery(other)[0]):
                report("weights are refitted while work is pending")
                return False
        if int(ask(driver.cuStreamIsCapturing(stream))):
            report("weights are refitted in a capture")
            return False
        if self.get_missing_weights():
            return False
        if gone := [name for name, (weights, _) in self._weights.items() if weights.is_gone]:
            report(f"the array of {gone[0]} was released before the refit")
            return False
        assert self.engine.arithmetic is not None
        self.engine.arithmetic.refit(
            {name: (w.dtype.value, w.address, w.size) for name, (w, _) in self._weights.items()}
        )
        self.engine.refits += 1
        return True
