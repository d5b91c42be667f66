"""What tests import as TensorRT for RTX on the driver's stand-in: `runtime_rig` with ONNX Runtime,
and of the builder as much as writes down what a plan was built with.
"""

import enum
import json
from pathlib import Path
from typing import Any

import onnx
from ort_arithmetic import OrtArithmetic
from runtime_rig import *  # noqa: F403
from runtime_rig import Engine, ILogger, Refitter

__version__ = "1.7.1.116"


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class BuilderFlag(enum.Enum):
    TF32, STRIP_PLAN, REFIT_IDENTICAL, REFIT_INDIVIDUAL = range(4)
    WEIGHT_STREAMING, REQUIRE_USER_ALLOCATION = range(4, 6)


REFITS = {BuilderFlag.REFIT_IDENTICAL, BuilderFlag.REFIT_INDIVIDUAL}


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ComputeCapability(enum.IntEnum):
    CURRENT, SM75, SM80, SM86, SM89, SM120, SM121 = 1, 75, 80, 86, 89, 120, 121


class LayerType(enum.Enum):
    ATTENTION_INPUT, NORMALIZATION = range(2)


class IProgressMonitor:
    pass


class BuilderConfig:
    builder_optimization_level = 3
    profiling_verbosity: Any = None
    progress_monitor: Any = None
    num_compute_capabilities = 0

    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.capabilities: list[ComputeCapability] = []
        self.profiles: list[dict[str, Any]] = []

    def set_flag(self, flag: BuilderFlag) -> None:
        if flag in REFITS:  # each unsets the other
            self.flags -= REFITS
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        pass

    def set_compute_capability(self, capability: ComputeCapability, index: int) -> None:
        assert index < self.num_compute_capabilities
        self.capabilities.append(capability)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.ranges)
        return len(self.profiles) - 1


class OptimizationProfile:
    def __init__(self) -> None:
        self.ranges: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.ranges[name] = shapes


class Network:
    """Its weights are the graph's; which layers there are is not said."""

    num_layers = 0

    def __init__(self) -> None:
        self.graph = ""
        self.weights: set[str] = set()
        self.refittable: list[str] = []

    def mark_weights_refittable(self, name: str) -> bool:
        if name not in self.weights:
            return False
        self.refittable.append(name)
        return True


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        flags = config.flags
        streamed = BuilderFlag.WEIGHT_STREAMING in flags
        own = BuilderFlag.REQUIRE_USER_ALLOCATION in flags
        if streamed and own:
            self.logger.log(ILogger.ERROR, "user allocation excludes weight streaming")
            return None
        individual = BuilderFlag.REFIT_INDIVIDUAL in flags
        if individual and config.capabilities != [ComputeCapability.CURRENT]:
            self.logger.log(ILogger.ERROR, "CPU-only AoT does not support weights engines")
            return None
        plan = {
            "graph": network.graph,
            "stripped": BuilderFlag.STRIP_PLAN in flags,
            "streamed": streamed,
            "user_allocation": own,
            "refittable": network.refittable if individual else [],
            "profiles": config.profiles,
        }
        return json.dumps(plan).encode()


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.graph = str(Path(path).resolve())
        if not Path(path).exists():
            return False
        model = onnx.load(path, load_external_data=False)
        self.network.weights = {initializer.name for initializer in model.graph.initializer}
        return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, content: Any) -> Engine | None:
        try:
            plan = json.loads(bytes(content))
        except ValueError:
            self.logger.log(ILogger.ERROR, "this is no plan")
            return None
        return Engine(plan, lambda: OrtArithmetic(Path(plan["graph"])))


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        return Path(path).exists()
