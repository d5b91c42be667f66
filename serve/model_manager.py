"""The engines of a server by name: loaded in the background, drained and closed at the end."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sdrt.runtime import Pipeline
from sdrt.runtime.batching.engine import InflightBatcher

from .errors import ApiError
from .metrics import Metrics
from .settings import Settings

log = logging.getLogger("sdrt.serve")

Load = Callable[[], Pipeline]


@dataclass(frozen=True, slots=True)
class Source:
    """How a model's pipeline is loaded, and where its measured costs are kept."""

    load: Load
    kept: Path | None = None


LOADING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Model:
    """One bundle at work."""

    name: str
    pipe: Pipeline
    engine: InflightBatcher

    @property
    def sizes(self) -> list[str]:
        return [f"{width}x{height}" for width, height in self.pipe.manifest.sizes]


@dataclass(slots=True)
class Models:
    """
    sources: the models by name; the first is the default
    on_demand: each is started when it is asked for, not all by `load`
    failed: why loading ended the server
    """

    sources: Mapping[str, Source]
    settings: Settings
    metrics: Metrics
    on_demand: bool = False
    begun: int = field(default_factory=lambda: int(time.time()))
    failed: Exception | None = None
    _loaded: dict[str, Model] = field(default_factory=dict)
    _ending: threading.Event = field(default_factory=threading.Event)
    _engines: dict[str, InflightBatcher] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics.watch(self._engines)

    def load(self) -> None:
        """Load every model and start its engine; `failed` holds what went wrong."""
        for name in self.sources:
            if self._ending.is_set():
                return
            try:
                self.start(name)
            except Exception as error:
                self.failed = error
                return

    def start(self, name: str) -> None:
        """Load one model and start its engine; raises what loading raises."""
        model = self._started(name, self.sources[name])
        self._engines[name] = model.engine
        self._loaded[name] = model
        log.info("ready: %s, %s", name, ", ".join(model.sizes))

    def stop(self, name: str) -> None:
        """Let what one model has begun end within the limit, then close it, if it is loaded."""
        if model := self._loaded.get(name):
            model.engine.drain(self.settings.drain)
            del self._engines[name], self._loaded[name]
            model.engine.close()
            model.pipe.close()

    def _started(self, name: str, source: Source) -> Model:
        pipe, settings = source.load(), self.settings
        engine = InflightBatcher(
            pipe,
            slots=settings.slots,
            waiting=settings.waiting,
            deterministic=settings.deterministic,
            observer=self.metrics.observer(name),
            reload=source.load,
            kept=source.kept,
        )
        engine.start()
        return Model(name, pipe, engine)

    def known(self, name: str | None) -> str:
        """The name of a model, or of the first; raises ApiError 404 for an unknown one."""
        wanted = next(iter(self.sources)) if name is None else name
        if wanted not in self.sources:
            have = ", ".join(self.sources)
            raise ApiError(
                404, f"no model {wanted!r}; this server has {have}", "model", "model_not_found"
            )
        return wanted

    def named(self, name: str | None) -> Model:
        """A model, or the first; raises ApiError 404 where unknown, 503 while it is loading."""
        wanted = self.known(name)
        if wanted not in self._loaded:
            state = self.states[wanted]
            raise ApiError(503, f"{wanted} is {state}", code=state, retry_after=LOADING_SECONDS)
        return self._loaded[wanted]

    @property
    def states(self) -> dict[str, str]:
        """Each model's engine's state: loading, ready, draining, broken or closed; unloaded where
        models are started when they are asked for.
        """
        absent = "unloaded" if self.on_demand else "loading"
        absent = "draining" if self._ending.is_set() else absent
        loaded = dict(self._loaded)
        return {
            name: loaded[name].engine.state if name in loaded else absent for name in self.sources
        }

    def sizes(self, name: str) -> list[str]:
        """A model's sizes, none before it is loaded."""
        return self._loaded[name].sizes if name in self._loaded else []

    def drain(self) -> bool:
        """Take nothing new and let what runs end within the limit; whether it did."""
        self._ending.set()
        models = list(self._loaded.values())
        with ThreadPoolExecutor(max(1, len(models))) as pool:
            seconds = self.settings.drain
            return all(list(pool.map(lambda model: model.engine.drain(seconds), models)))

    def close(self) -> None:
        """End the engines, cancelling what is unfinished, and give their memory back; once."""
        while self._loaded:
            _, model = self._loaded.popitem()
            model.engine.close()
            model.pipe.close()
