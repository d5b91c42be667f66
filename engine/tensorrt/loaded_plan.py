"""A plan on a GPU: its engine, and for every set of shapes a context, buffers and a CUDA graph.

Knows the runtime half of TensorRT's API and one `Device`; all components of the process share the
device's arena, one at a time. Not yet run on a GPU.
"""

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdrt.bundle.manifest import Component, TensorSpec
from sdrt.engine.cuda.driver import CudaGraph, Device, MirroredBuffer, keep_for_ever
from sdrt.engine.gpu import GPU_LOCK
from sdrt.engine.plan_signing import read_signed, write_signed
from sdrt.engine.plans import Plan, Profile
from sdrt.errors import BackendError

from .builder import rewrite_graph
from .inspector import inspect_layers
from .refitting import PlanRefitter, Weights, fixed_weights_error
from .variants import RTX, get_features, get_logger, load_module

log = logging.getLogger(__name__)

MAX_SHAPES = 8
PlanId = tuple[str, str, int, int]  # path, sha256, GPU, number; see `load_engine`


@dataclass(slots=True)
class ShapeBinding:
    """One set of shapes: its context, and its tensors in host and GPU memory.

    Attributes:
        arena_version: That of the arena that the context has; -1 before it has one.
        capturable: Whether calls may be captured into a CUDA graph.
    """

    context: Any
    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, MirroredBuffer] = field(default_factory=dict)
    scratch_bytes: int = 0
    arena_version: int = -1
    graph: CudaGraph | None = None
    capturable: bool = True

    def close_graph(self) -> None:
        graph, self.graph = self.graph, None
        if graph:
            graph.close()


class LoadedPlan:
    """A plan on a GPU, shared by every pipeline of the process that uses it."""

    def __init__(self, plan: Plan, component: Component, graph: Path, device: Device) -> None:
        self.plan, self.component, self.device = plan, component, device
        self._graph = graph
        self._trt = trt = load_module(plan.key.kind)
        self._logger = get_logger(trt)
        self._bindings: OrderedDict[tuple[Any, ...], ShapeBinding] = OrderedDict()
        self.sampling_graphs: Any = None  # a UNet's `SamplingGraphCache`
        self.weights_version = 0  # raised by every change, which invalidates captured graphs
        self._refitter: PlanRefitter | None = None
        with device.use(), GPU_LOCK:
            self._check_memory()
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._deserialize()
            if plan.key.stripped:
                self._fill(graph)
            if plan.key.streamed:
                self._stream_weights()
            if plan.key.refittable:
                of = trt, self._engine, self._logger
                self._refitter = PlanRefitter(*of, plan.key.component, graph)
            self._cache_path = plan.path.with_suffix(".kernels")
            self._cache_bytes = 0
            self._cache = self._open_runtime_cache()

    def _check_memory(self) -> None:
        free, total = self.device.memory()
        stripped = self.plan.key.stripped
        log.info(
            "%s: plan of %.0f MB%s; GPU %d has %.0f of %.0f MB free",
            self.plan.key.component,
            self.plan.size / 1e6,
            " without weights" if stripped else "",
            self.device.index,
            free / 1e6,
            total / 1e6,
        )
        if self.plan.size > free and not self.plan.key.streamed:
            raise BackendError(
                f"{self.plan.key.component} needs {self.plan.size / 1e6:,.0f} MB of GPU memory, "
                f"{free / 1e6:,.0f} MB are free",
                hint=f"stop other programs that use GPU {self.device.index}",
            )

    def _deserialize(self) -> Any:
        runtime = self._runtime
        self._logger.errors = []
        with self.plan.verified() as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            reason = " / ".join(self._logger.errors) or "no reason reported"
            raise BackendError(f"TensorRT failed to load {self.plan.path}: {reason}")
        return engine

    def _stream_weights(self) -> None:
        """Keep as many weights on the GPU as fit; TensorRT copies the others when they are used."""
        engine = self._engine
        budget = int(engine.get_weight_streaming_automatic_budget())
        engine.weight_streaming_budget_v2 = min(budget, int(engine.streamable_weights_size))
        log.info(
            "%s: %.0f of %.0f MB of weights on the GPU",
            self.plan.key.component,
            engine.weight_streaming_budget_v2 / 1e6,
            engine.streamable_weights_size / 1e6,
        )

    def _fill(self, graph: Path) -> None:
        """Fill a plan that was built without weights from the bundle's file."""
        trt, engine = self._trt, self._engine
        refitter = trt.Refitter(engine, self._logger)
        parser_refitter = trt.OnnxParserRefitter(refitter, self._logger)
        content = rewrite_graph(trt, graph)
        accepted = (
            parser_refitter.refit_from_bytes(content, str(graph))
            if content
            else parser_refitter.refit_from_file(str(graph))
        )
        if not accepted or not refitter.refit_cuda_engine():
            missing = ", ".join(refitter.get_missing_weights()[:3])
            raise BackendError(
                f"TensorRT failed to refit {self.plan.path} with the bundle's weights ({missing})"
            )

    def refit(self, weights: Weights) -> None:
        """See `Engine.refit`; the caller holds the device.

        Raises BackendError where the plan was not built for it, or TensorRT refuses.
        """
        if self._refitter is None:
            if weights:
                raise fixed_weights_error(self.plan.key, self._graph.parent.parent)
            return
        chosen = self._refitter.select(weights)
        if not self._refitter.has_changes(chosen):
            return
        with GPU_LOCK:
            self.device.synchronize()  # undefined while other work of the engine is pending
            self.weights_version += 1
            for binding in self._bindings.values():
                binding.close_graph()
            self._logger.errors = []
            self._refitter.replace(chosen, int(self.device.stream))
            self.device.synchronize()

    def _open_runtime_cache(self) -> Any:
        """The kernels that TensorRT for RTX compiled earlier; None for full TensorRT."""
        if self.plan.key.kind != RTX:
            return None
        engine = self._engine
        config = engine.create_runtime_config()
        cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            cache.deserialize(read_signed(self._cache_path))
        return cache

    def _save_runtime_cache(self) -> None:
        """Store the kernels that were compiled since it was stored last."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if len(content) != self._cache_bytes:
            with contextlib.suppress(OSError):
                write_signed(self._cache_path, content)
                self._cache_bytes = len(content)

    def _new_context(self) -> Any:
        trt, engine = self._trt, self._engine
        strategy = trt.ExecutionContextAllocationStrategy
        # Streamed weights are copied into memory that TensorRT allocates while it runs.
        streamed = self.plan.key.streamed
        chosen = strategy.ON_PROFILE_CHANGE if streamed else strategy.USER_MANAGED
        if self._cache is None:
            context = engine.create_execution_context(chosen)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(chosen)
            config.set_runtime_cache(self._cache)
            # Every shape has a graph of its own, which must not capture a fallback kernel.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            context = engine.create_execution_context(config)
        if context is None:
            raise self._error("create a context")
        return context

    def _error(self, action: str) -> BackendError:
        reason = " / ".join(self._logger.errors) or "no reason reported"
        return BackendError(f"TensorRT failed to {action} of {self.plan.path.name}: {reason}")

    def _check(self, accepted: bool, action: str) -> None:
        """Raise BackendError, with what TensorRT said, where it refuses."""
        if not accepted:
            raise self._error(action)

    def layers(self) -> list[Mapping[str, Any]]:
        """Every layer as the engine inspector reports it."""
        with self.device.use():
            return inspect_layers(self._trt, self._engine)

    def bind(self, shapes: dict[str, tuple[int, ...]]) -> ShapeBinding:
        """The binding for these input shapes; the least recently used is evicted."""
        key = tuple(shapes.values())
        if key not in self._bindings:
            with GPU_LOCK:
                self._bindings[key] = self._create_binding(shapes)
        self._bindings.move_to_end(key)
        while len(self._bindings) > MAX_SHAPES:
            self._release(self._bindings.popitem(last=False)[1])
        return self._bindings[key]

    def _create_binding(self, shapes: dict[str, tuple[int, ...]]) -> ShapeBinding:
        index = find_profile(self.plan.key.component, self.plan.key.profiles, shapes)
        self._logger.errors = []
        binding = ShapeBinding(self._new_context(), dict(shapes))
        binding.capturable = not self.plan.key.streamed
        try:
            self._set_shapes(binding, index)
            for spec in (*self.component.inputs, *self.component.outputs):
                self._add_tensor(binding, spec)
            if not self.plan.key.streamed:
                size = binding.context.update_device_memory_size_for_shapes()
                binding.scratch_bytes = int(size)
        except RuntimeError as error:  # pybind's
            self._release(binding)
            raise self._error("set the shapes") from error
        except BaseException:
            self._release(binding)
            raise
        return binding

    def _set_shapes(self, binding: ShapeBinding, profile: int) -> None:
        context, stream = binding.context, int(self.device.stream)
        self._check(context.set_optimization_profile_async(profile, stream), "select a profile")
        for name, shape in binding.shapes.items():
            self._check(context.set_input_shape(name, shape), f"set the shape of {name}")
        if missing := context.infer_shapes():
            raise BackendError(f"{self.plan.key.component}: no shape for {', '.join(missing)}")

    def _add_tensor(self, binding: ShapeBinding, spec: TensorSpec) -> None:
        shape = tuple(binding.context.get_tensor_shape(spec.name))
        binding.shapes[spec.name] = shape
        tensor = binding.tensors[spec.name] = MirroredBuffer(self.device, shape, spec.dtype)
        accepted = binding.context.set_tensor_address(spec.name, tensor.address)
        self._check(accepted, f"set the address of {spec.name}")

    def prepare(self, binding: ShapeBinding) -> bool:
        """Attach the arena; returns whether graphs that were captured earlier are still valid."""
        if self.plan.key.streamed:
            return True
        device, context = self.device, binding.context
        device.grow_arena(binding.scratch_bytes)
        if binding.arena_version == device.arena_version:
            return True
        context.set_device_memory(device.arena, device.arena_size)
        binding.arena_version = device.arena_version
        binding.close_graph()
        return False

    def is_capturable(self, binding: ShapeBinding) -> bool:
        """Whether calls may be captured, as far as TensorRT tells."""
        asks = get_features(self._trt).asks_capturable
        stream = int(self.device.stream)
        if binding.capturable and asks and not binding.context.is_stream_capturable(stream):
            component = self.plan.key.component
            log.warning("%s runs without a CUDA graph: its plan cannot be captured", component)
            binding.capturable = False
        return binding.capturable

    def enqueue(self, binding: ShapeBinding) -> None:
        """Put one call into the stream; inputs and outputs are in GPU memory."""
        context = binding.context
        self._logger.errors = []
        self._check(context.execute_async_v3(int(self.device.stream)), "run a call")

    def run(self, binding: ShapeBinding) -> None:
        """Run once, by the CUDA graph of these shapes; the first call captures it."""
        self.prepare(binding)
        if binding.graph is None and self.is_capturable(binding):
            self._capture(binding)
        if binding.graph is None:
            self.enqueue(binding)
        else:
            binding.graph.launch()

    def warm_up(self, binding: ShapeBinding) -> None:
        """Run once, since TensorRT sets up and compiles what a capture must not contain."""
        self.enqueue(binding)
        self.device.synchronize()
        self._save_runtime_cache()

    def _capture(self, binding: ShapeBinding) -> None:
        self.warm_up(binding)
        try:
            with self.device.capture() as graph:
                self.enqueue(binding)
        except BackendError as error:
            log.warning("%s runs without a CUDA graph: %s", self.plan.key.component, error)
            binding.capturable = False
            return
        binding.graph = graph

    def _release(self, binding: ShapeBinding) -> None:
        binding.close_graph()
        binding.context = None
        for tensor in binding.tensors.values():
            tensor.close()

    def close(self) -> None:
        """Release contexts, then the engine, then the runtime: TensorRT's order."""
        if self.device.fatal_error:
            keep_for_ever(self)  # its destructors would call into a context that is lost
            return
        with self.device.use():
            self.device.synchronize()
            self._save_runtime_cache()
            if self.sampling_graphs:
                self.sampling_graphs.close()
            for binding in self._bindings.values():
                self._release(binding)
            self._bindings.clear()
            self._cache = None
            self._refitter = None
            self._engine = None
            self._runtime = None


def find_profile(
    component: str, profiles: tuple[Profile, ...], shapes: dict[str, tuple[int, ...]]
) -> int:
    """The index of the profile that covers these shapes; raises BackendError if none does."""
    for index, profile in enumerate(profiles):
        if all(
            low <= length <= high
            for name, (minimum, _, maximum) in profile.items()
            for low, length, high in zip(minimum, shapes[name], maximum, strict=True)
        ):
            return index
    ranges = [
        {
            name: f"{list(minimum)} to {list(maximum)}"
            for name, (minimum, _, maximum) in profile.items()
        }
        for profile in profiles
    ]
    raise BackendError(
        f"the plan of {component} has no profile for {shapes}; it has {ranges}",
        hint="generate fewer images at once, shorten the prompt, or build the bundle with another "
        "--batch or --size",
    )


class LoadedPlans:
    """The plans that this process has loaded: each once, while an engine uses it."""

    def __init__(self) -> None:
        self._plans: dict[PlanId, LoadedPlan] = {}
        self._users: dict[PlanId, int] = {}
        self._lock = threading.Lock()

    def acquire(self, plan_id: PlanId, load: Callable[[], LoadedPlan]) -> LoadedPlan:
        """The plan of this identity, loaded by whoever asks first."""
        with self._lock:
            if plan_id not in self._plans:
                self._plans[plan_id] = load()
            self._users[plan_id] = self._users.get(plan_id, 0) + 1
            return self._plans[plan_id]

    def release(self, plan: LoadedPlan) -> None:
        """Close the plan when its last user releases it."""
        with self._lock:
            for plan_id in [key for key, value in self._plans.items() if value is plan]:
                self._users[plan_id] -= 1
                if self._users[plan_id]:
                    return
                del self._plans[plan_id], self._users[plan_id]
            plan.close()
            device = plan.device
            if not device.fatal_error and all(p.device is not device for p in self._plans.values()):
                with device.use():
                    device.free_arena()


loaded_plans = LoadedPlans()
