"""A plan on a GPU: its engine, and for every set of shapes a context, buffers and a CUDA graph.

Knows the runtime half of TensorRT's API and one `Device`; all components of the process take turns
in the device's arena. Never run on a GPU yet.
"""

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdrt.bundle.manifest import Component
from sdrt.engine.cuda.driver import Device, Graph, Mirrored, reset_device
from sdrt.engine.gpu import GPU_LOCK
from sdrt.engine.plan_signing import read_ours, write_ours
from sdrt.engine.plans import Plan, Profile
from sdrt.errors import BackendError

from .inspector import inspected
from .variants import RTX, logger_of, module_of

log = logging.getLogger(__name__)

MAX_SHAPES = 8
loaded_plans: dict[tuple[str, str, int], "Loaded"] = {}
loading = threading.Lock()


@dataclass(slots=True)
class Bound:
    """One set of shapes: its context, and its tensors here and on the GPU.

    arena: where the scratch memory was when the context and the graph were made
    """

    context: Any
    shapes: dict[str, tuple[int, ...]]
    tensors: dict[str, Mirrored] = field(default_factory=dict)
    scratch: int = 0
    arena: int = 0
    graph: Graph | None = None
    capturable: bool = True


class Loaded:
    """A plan on a GPU, shared by every pipeline of the process that uses it."""

    def __init__(self, plan: Plan, component: Component, graph: Path, device: Device) -> None:
        self.plan, self.component, self.device, self.users = plan, component, device, 0
        self._trt = trt = module_of(plan.key.kind)
        self._logger = logger_of(trt)
        self._bound: OrderedDict[tuple[Any, ...], Bound] = OrderedDict()
        self.loops: Any = None  # a UNet's sampling graphs
        with device.use(), GPU_LOCK:
            self._refuse_without_room()
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._deserialized()
            if plan.key.stripped:
                self._fill_in(graph)
            if plan.key.streamed:
                self._stream_weights()
            self._cache_path = plan.path.with_suffix(".kernels")
            self._cache = self._runtime_cache()

    def _refuse_without_room(self) -> None:
        free, total = self.device.memory()
        stripped = self.plan.key.stripped
        log.info(
            "%s: plan of %.0f MB%s; GPU %d has %.0f MB free of %.0f",
            self.plan.key.component,
            self.plan.size / 1e6,
            ", weights beside it" if stripped else "",
            self.device.index,
            free / 1e6,
            total / 1e6,
        )
        if self.plan.size > free and not self.plan.key.streamed:
            raise BackendError(
                f"{self.plan.key.component} needs {self.plan.size / 1e6:,.0f} MB of GPU memory and "
                f"{free / 1e6:,.0f} MB are free; end what else uses GPU {self.device.index}"
            )

    def _deserialized(self) -> Any:
        runtime = self._runtime
        self._logger.errors = []
        with self.plan.verified() as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            said = " / ".join(self._logger.errors) or "it does not say why"
            raise BackendError(f"TensorRT does not load {self.plan.path}: {said}")
        return engine

    def _stream_weights(self) -> None:
        """As many of the weights as have room live on the GPU; the others come when needed."""
        engine = self._engine
        room = int(engine.get_weight_streaming_automatic_budget())
        engine.weight_streaming_budget_v2 = min(room, int(engine.streamable_weights_size))
        log.info(
            "%s: %.0f MB of its %.0f MB of weights on the GPU",
            self.plan.key.component,
            engine.weight_streaming_budget_v2 / 1e6,
            engine.streamable_weights_size / 1e6,
        )

    def _fill_in(self, graph: Path) -> None:
        """The weights of a plan that was built without, from the bundle's file."""
        trt, engine = self._trt, self._engine
        refitter = trt.Refitter(engine, self._logger)
        parser_refitter = trt.OnnxParserRefitter(refitter, self._logger)
        if not parser_refitter.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            missing = ", ".join(refitter.get_missing_weights()[:3])
            raise BackendError(
                f"{self.plan.path} cannot be filled with the bundle's weights ({missing})"
            )

    def _runtime_cache(self) -> Any:
        """Kernels that TensorRT for RTX made for these shapes before; None for the other kind."""
        if self.plan.key.kind != RTX:
            return None
        engine = self._engine
        config = engine.create_runtime_config()
        cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            cache.deserialize(read_ours(self._cache_path))
        return cache

    def _new_context(self) -> Any:
        trt, engine = self._trt, self._engine
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None:
            context = engine.create_execution_context(managed)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            config.set_runtime_cache(self._cache)
            # Every shape has a graph of its own, which must not begin with a makeshift kernel.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            context = engine.create_execution_context(config)
        if context is None:
            raise BackendError(f"TensorRT makes no context of {self.plan.path.name}")
        return context

    def layers(self) -> list[Mapping[str, Any]]:
        """What the engine inspector tells of every layer."""
        with self.device.use():
            return inspected(self._trt, self._engine)

    def bound(self, shapes: dict[str, tuple[int, ...]]) -> Bound:
        """What runs these input shapes; made where it is not there, the oldest is dropped."""
        mark = tuple(shapes.values())
        if mark not in self._bound:
            with GPU_LOCK:
                self._bound[mark] = self._bind(shapes)
        self._bound.move_to_end(mark)
        while len(self._bound) > MAX_SHAPES:
            self._release(self._bound.popitem(last=False)[1])
        return self._bound[mark]

    def _bind(self, shapes: dict[str, tuple[int, ...]]) -> Bound:
        index = profile_index(self.plan.key.component, self.plan.key.profiles, shapes)
        context, device = self._new_context(), self.device
        context.set_optimization_profile_async(index, int(device.stream))
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        if missing := context.infer_shapes():
            raise BackendError(f"{self.plan.key.component}: no shape for {', '.join(missing)}")
        made = Bound(context, dict(shapes))
        try:
            for spec in (*self.component.inputs, *self.component.outputs):
                shape = tuple(context.get_tensor_shape(spec.name))
                made.shapes[spec.name] = shape
                tensor = made.tensors[spec.name] = Mirrored(device, shape, spec.dtype)
                context.set_tensor_address(spec.name, tensor.address)
            made.scratch = int(context.update_device_memory_size_for_shapes())
        except BackendError:
            self._release(made)
            raise
        return made

    def ready(self, bound: Bound) -> bool:
        """Give it the arena; returns whether graphs that were captured before still hold."""
        device, context = self.device, bound.context
        device.grown(bound.scratch)
        if bound.arena == device.arena:
            return True
        context.set_device_memory(device.arena, device.arena_size)
        bound.arena = device.arena
        if bound.graph:
            bound.graph.close()
            bound.graph = None
        return False

    def enqueue(self, bound: Bound) -> None:
        """Put one run into the stream; inputs and outputs are in GPU memory."""
        context = bound.context
        self._logger.errors = []
        if not context.execute_async_v3(int(self.device.stream)):
            said = " / ".join(self._logger.errors) or "it does not say why"
            raise BackendError(f"TensorRT failed in {self.plan.key.component}: {said}")

    def run(self, bound: Bound) -> None:
        """One run by the shapes' CUDA graph, which the first run captures."""
        self.ready(bound)
        if bound.graph is None and bound.capturable:
            self._capture(bound)
        if bound.graph is None:
            self.enqueue(bound)
        else:
            bound.graph.launch()

    def _capture(self, bound: Bound) -> None:
        self.enqueue(bound)  # TensorRT prepares what a capture may not
        self.device.synchronize()
        try:
            with self.device.capturing() as graph:
                self.enqueue(bound)
        except BackendError as error:
            if self.device.broken:
                raise
            log.warning("%s runs without a CUDA graph: %s", self.plan.key.component, error)
            bound.capturable = False
            return
        bound.graph = graph

    def _release(self, bound: Bound) -> None:
        if bound.graph:
            bound.graph.close()
        bound.context = None
        for tensor in bound.tensors.values():
            tensor.close()

    def close(self) -> None:
        """Contexts first, then the engine, then the runtime, as TensorRT wants it."""
        if self.device.broken:
            reset_device(self.device.index)
            return
        with self.device.use():
            self.device.synchronize()
            cache = self._cache
            if cache is not None:
                with contextlib.suppress(OSError):
                    write_ours(self._cache_path, bytes(cache.serialize()))
            if self.loops:
                self.loops.close()
            for bound in self._bound.values():
                self._release(bound)
            self._bound.clear()
            self._cache = None
            self._engine = None
            self._runtime = None


def profile_index(
    component: str, profiles: tuple[Profile, ...], shapes: dict[str, tuple[int, ...]]
) -> int:
    """The profile that holds these shapes; raises BackendError if none does."""
    for index, profile in enumerate(profiles):
        if all(
            low <= length <= high
            for name, (least, _, most) in profile.items()
            for low, length, high in zip(least, shapes[name], most, strict=True)
        ):
            return index
    ranges = [
        {name: f"{list(least)} to {list(most)}" for name, (least, _, most) in profile.items()}
        for profile in profiles
    ]
    raise BackendError(
        f"{component}: its plan has no profile for {shapes}; it has {ranges}. Make fewer pictures "
        "at once or a shorter prompt, or build the bundle with another --batch or --size"
    )
