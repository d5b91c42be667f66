"""The models of a server: loads their engines in the background, drains and closes them.

Knows pipelines and batchers. Which models are in memory is decided in `model_cache`, where there is
a memory budget.
"""

import asyncio
import collections
import contextlib
import gc
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sdrt.bundle.manifest import Manifest
from sdrt.errors import DeviceLostError
from sdrt.runtime import Pipeline
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.batching.request import RequestHandle, RequestRejected
from sdrt.runtime.process_memory import (
    Gpu,
    detect_gpus,
    format_bytes,
    free_memory,
    resident_bytes,
    trim_heap,
)

from .errors import ApiError
from .metrics import Metrics
from .model_cache import ModelCache, Residence
from .settings import Settings

log = logging.getLogger("sdrt.serve")

PipelineLoader = Callable[[], Pipeline]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """How to load a model's pipeline.

    Attributes:
        cost_cache: Where its measured costs are cached.
        manifest: Describes the model while it is not loaded.
        estimated_bytes: The memory that it needs, estimated.
        controlnets: Names of its ControlNets.
        ip_adapter: The name of its IP-Adapter.
        refiner: The name of its refiner.
    """

    load: PipelineLoader
    cost_cache: Path | None = None
    manifest: Manifest | None = None
    estimated_bytes: int = 0
    controlnets: tuple[str, ...] = ()
    ip_adapter: str | None = None
    refiner: str | None = None


RETRY_AFTER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded bundle and its engine."""

    name: str
    pipe: Pipeline
    engine: InflightBatcher

    @property
    def sizes(self) -> list[str]:
        return [f"{width}x{height}" for width, height in self.pipe.manifest.sizes]


@dataclass(slots=True)
class ModelManager:
    """The models of one server by name.

    Attributes:
        sources: How to load each model; the first is the default.
        on_demand: Models are loaded by `load_model` on first use, not all by `load_all`.
        load_error: Why loading failed.
        cache: Which models are in memory; None without a memory budget: all of them.
        loads: How often each model was loaded.
        evictions: How often each model was unloaded before the server stopped.
    """

    sources: Mapping[str, ModelSource]
    settings: Settings
    metrics: Metrics
    on_demand: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    load_error: Exception | None = None
    cache: ModelCache | None = None
    loads: collections.Counter[str] = field(default_factory=collections.Counter)
    evictions: collections.Counter[str] = field(default_factory=collections.Counter)
    _loaded: dict[str, LoadedModel] = field(default_factory=dict)
    _draining: threading.Event = field(default_factory=threading.Event)
    _engines: dict[str, InflightBatcher] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UsageError for a model that cannot fit into the memory budget."""
        self.metrics.track_engines(self._engines)
        self.metrics.track_models(self)
        if self.settings.memory_budget is None:
            return
        self.cache = ModelCache(
            {name: source.estimated_bytes for name, source in self.sources.items()},
            self.settings.memory_budget,
            self.settings.pinned_models,
            load=self._load_measured,
            unload=self.unload,
            max_waiting=self.settings.waiting,
        )

    def load_all(self) -> None:
        """Load every model and start its engine; under a memory budget the pinned ones. Sets
        `load_error` on a failure.
        """
        if self.cache:
            self.cache.start()
        for name in self.settings.pinned_models if self.cache else self.sources:
            if self._draining.is_set():
                return
            try:
                if self.cache:
                    self.cache.request(name).result()
                    self.cache.release(name)
                else:
                    self.load_model(name)
            except Exception as error:
                if not self._draining.is_set():
                    self.load_error = error
                return

    def load_model(self, name: str) -> None:
        """Load one model and start its engine; raises what its source raises."""
        started = time.monotonic()
        model = self._start_engine(name, self.sources[name])
        self._engines[name] = model.engine
        self._loaded[name] = model
        seconds = time.monotonic() - started
        self.loads[name] += 1
        log.info("Loaded model %s (%s) in %.1f s", name, ", ".join(model.sizes), seconds)

    def _load_measured(self, name: str) -> int:
        """Load one model; returns the bytes by which the memory in use has grown."""
        resident = resident_bytes()
        free = {gpu: free_memory(gpu) for gpu in detect_gpus().gpus}
        self.load_model(name)
        estimator = self._loaded[name].pipe.memory_estimator
        gpu = estimator.gpu if estimator else None
        grown = resident_bytes() - resident if gpu is None else _memory_taken(gpu, free.get(gpu))
        log.info("Model %s took %s of memory", name, format_bytes(max(0, grown)))
        return grown

    def unload(self, name: str) -> None:
        """Drain one model within the time limit and close it, if it is loaded."""
        if model := self._loaded.get(name):
            model.engine.drain(self.settings.drain_seconds)
            del self._engines[name], self._loaded[name]
            model.engine.close()
            model.pipe.close()
            del model
            gc.collect()
            trim_heap()
            self.evictions[name] += 1
            log.info("Unloaded model %s", name)

    def _start_engine(self, name: str, source: ModelSource) -> LoadedModel:
        pipe, settings = source.load(), self.settings
        engine = InflightBatcher(
            pipe,
            slots=settings.slots,
            waiting=settings.waiting,
            deterministic=settings.deterministic,
            observer=self.metrics.observer(name),
            reload=source.load,
            cost_cache=source.cost_cache,
        )
        engine.start()
        return LoadedModel(name, pipe, engine)

    def resolve_name(self, name: str | None) -> str:
        """The given name, or that of the default model; raises ApiError 404 for an unknown one."""
        resolved = next(iter(self.sources)) if name is None else name
        if resolved not in self.sources:
            available = ", ".join(self.sources)
            message = f"unknown model {resolved!r}; available: {available}"
            raise ApiError(404, message, "model", "model_not_found")
        return resolved

    def get(self, name: str | None) -> LoadedModel:
        """A loaded model, or the default one; raises ApiError 404 if unknown, 503 while loading."""
        resolved = self.resolve_name(name)
        if resolved not in self._loaded:
            state = self.states[resolved]
            raise ApiError(
                503, f"model {resolved} is {state}", code=state, retry_after=RETRY_AFTER_SECONDS
            )
        return self._loaded[resolved]

    @contextlib.asynccontextmanager
    async def use(self, name: str | None) -> AsyncGenerator[LoadedModel, None]:
        """A model, or the default one, which stays loaded inside the context. Under a memory budget
        it is loaded first if it is not.

        Raises:
            ApiError: 404 for an unknown model; 503 while it is loading.
            RequestRejected: It does not fit, or too many wait for it.
        """
        resolved = self.resolve_name(name)
        if self.cache is None:
            yield self.get(resolved)
            return
        try:
            await self._wait_until_loaded(self.cache, resolved)
        except RequestRejected as rejected:
            self.metrics.refused.labels(resolved, rejected.cause).inc()
            raise
        try:
            yield self._loaded[resolved]
        finally:
            self.cache.release(resolved)

    async def _wait_until_loaded(self, cache: ModelCache, name: str) -> None:
        future = cache.request(name)
        seconds = self.settings.load_timeout_seconds
        try:
            async with asyncio.timeout(seconds) as timeout:
                await asyncio.wrap_future(future)
        except BaseException:
            cache.withdraw(name, future)
            if not timeout.expired():
                raise
            self.metrics.refused.labels(name, "loading").inc()
            message = f"model {name} was not loaded within {seconds:g} s"
            raise ApiError(503, message, None, "loading", RETRY_AFTER_SECONDS) from None

    def hold(self, model: LoadedModel, handles: Sequence[RequestHandle]) -> None:
        """Keep a model that is in use loaded until these images are finished."""
        if cache := self.cache:
            for handle in handles:
                cache.hold(model.name)
                handle.future.add_done_callback(lambda _: cache.release(model.name))

    def unload_idle(self, name: str | None) -> None:
        """Free a model's memory, or the default one's, until it is used again.

        Raises:
            ApiError: 400 if models stay loaded here, 503 while it is in use.
        """
        resolved = self.resolve_name(name)
        if self.cache is None or resolved in self.settings.pinned_models:
            reason = "is pinned" if self.cache else "stays loaded while the server runs"
            raise ApiError(
                400, f"model {resolved} {reason}; start the server with --memory-budget, unpinned"
            )
        if not self.cache.evict_idle(resolved):
            message = f"model {resolved} is generating images"
            raise ApiError(503, message, None, "in_use", RETRY_AFTER_SECONDS)

    @property
    def states(self) -> dict[str, str]:
        """The state of each engine: loading, ready, draining, broken, lost or closed; unloaded or
        evicting if models are loaded on demand.
        """
        loaded = dict(self._loaded)
        return {name: self._state(name, loaded.get(name)) for name in self.sources}

    def _state(self, name: str, model: LoadedModel | None) -> str:
        if model and model.engine.state != "ready":
            return model.engine.state
        if self._draining.is_set():
            return "draining"
        if self.cache is None:
            not_loaded = "unloaded" if self.on_demand else "loading"
            return model.engine.state if model else not_loaded
        residence = self.cache.residence(name)
        if residence is Residence.UNLOADED and not model:
            is_pinned = name in self.settings.pinned_models
            return "loading" if is_pinned else "unloaded"
        return "ready" if residence is Residence.LOADED else residence.value

    @property
    def is_ready(self) -> bool:
        """Whether every model accepts requests, if only after it is loaded."""
        states = self.states
        if self.cache is None:
            return all(state in ("ready", "unloaded") for state in states.values())
        pinned = (states[name] for name in self.settings.pinned_models)
        failed = ("draining", "broken", "lost", "closed")
        return set(pinned) <= {"ready"} and not any(state in failed for state in states.values())

    @property
    def device_error(self) -> DeviceLostError | None:
        """Why the process can use its GPU no more, if so."""
        errors = (model.engine.device_error for model in list(self._loaded.values()))
        return next(filter(None, errors), None)

    def find(self, name: str) -> LoadedModel | None:
        """A model, None before it is loaded."""
        return self._loaded.get(name)

    def find_manifest(self, name: str) -> Manifest | None:
        """What a model is; None if that is known only once it is loaded."""
        model = self.find(name)
        return model.pipe.manifest if model else self.sources[name].manifest

    def size_bytes(self, name: str) -> int:
        """The memory that a model needs: estimated, and corrected once it was loaded."""
        return self.cache.size_bytes(name) if self.cache else self.sources[name].estimated_bytes

    def drain(self) -> bool:
        """Stop accepting requests and finish running ones; returns whether all finished in time."""
        self._draining.set()
        if self.cache:
            self.cache.close()
        models = list(self._loaded.values())
        with ThreadPoolExecutor(max(1, len(models))) as pool:
            seconds = self.settings.drain_seconds
            return all(list(pool.map(lambda model: model.engine.drain(seconds), models)))

    def close(self) -> None:
        """Close all engines, cancelling unfinished requests, and free their memory. Idempotent."""
        if self.cache:
            self.cache.close()
        while self._loaded:
            _, model = self._loaded.popitem()
            model.engine.close()
            model.pipe.close()


def _memory_taken(gpu: Gpu, free_before: int | None) -> int:
    """Bytes by which a GPU's free memory has shrunk; 0 if unknown."""
    free = free_memory(gpu)
    return 0 if free is None or free_before is None else free_before - free
