"""The models of a server: loads their engines in the background, drains and closes them."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sdrt.errors import DeviceLostError
from sdrt.runtime import Pipeline
from sdrt.runtime.batching.engine import InflightBatcher

from .errors import ApiError
from .metrics import Metrics
from .settings import Settings

log = logging.getLogger("sdrt.serve")

PipelineLoader = Callable[[], Pipeline]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """How to load a model's pipeline, and where to cache its measured costs."""

    load: PipelineLoader
    cost_cache: Path | None = None


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
        on_demand: Models are loaded on first use, not all by `load_all`.
        load_error: Why loading failed.
    """

    sources: Mapping[str, ModelSource]
    settings: Settings
    metrics: Metrics
    on_demand: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    load_error: Exception | None = None
    _loaded: dict[str, LoadedModel] = field(default_factory=dict)
    _draining: threading.Event = field(default_factory=threading.Event)
    _engines: dict[str, InflightBatcher] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics.track_engines(self._engines)

    def load_all(self) -> None:
        """Load every model and start its engine; sets `load_error` on a failure."""
        for name in self.sources:
            if self._draining.is_set():
                return
            try:
                self.load_model(name)
            except Exception as error:
                self.load_error = error
                return

    def load_model(self, name: str) -> None:
        """Load one model and start its engine; raises what its source raises."""
        started = time.monotonic()
        model = self._start_engine(name, self.sources[name])
        self._engines[name] = model.engine
        self._loaded[name] = model
        seconds = time.monotonic() - started
        log.info("Loaded model %s (%s) in %.1f s", name, ", ".join(model.sizes), seconds)

    def unload(self, name: str) -> None:
        """Drain one model within the time limit and close it, if it is loaded."""
        if model := self._loaded.get(name):
            model.engine.drain(self.settings.drain_seconds)
            del self._engines[name], self._loaded[name]
            model.engine.close()
            model.pipe.close()

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

    @property
    def states(self) -> dict[str, str]:
        """The state of each engine: loading, ready, draining, broken, lost or closed; unloaded if
        models are loaded on demand.
        """
        not_loaded = "unloaded" if self.on_demand else "loading"
        not_loaded = "draining" if self._draining.is_set() else not_loaded
        loaded = dict(self._loaded)
        return {
            name: loaded[name].engine.state if name in loaded else not_loaded
            for name in self.sources
        }

    @property
    def device_error(self) -> DeviceLostError | None:
        """Why the process can use its GPU no more, if so."""
        errors = (model.engine.device_error for model in list(self._loaded.values()))
        return next(filter(None, errors), None)

    def find(self, name: str) -> LoadedModel | None:
        """A model, None before it is loaded."""
        return self._loaded.get(name)

    def sizes(self, name: str) -> list[str]:
        """The sizes of a model, empty before it is loaded."""
        return model.sizes if (model := self.find(name)) else []

    def drain(self) -> bool:
        """Stop accepting requests and finish running ones; returns whether all finished in time."""
        self._draining.set()
        models = list(self._loaded.values())
        with ThreadPoolExecutor(max(1, len(models))) as pool:
            seconds = self.settings.drain_seconds
            return all(list(pool.map(lambda model: model.engine.drain(seconds), models)))

    def close(self) -> None:
        """Close all engines, cancelling unfinished requests, and free their memory. Idempotent."""
        while self._loaded:
            _, model = self._loaded.popitem()
            model.engine.close()
            model.pipe.close()
