"""Engines that load when they are first needed, and that make room for each other.

Knows the engine protocol; no backend.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from sdrt.bundle.manifest import Component, TensorSpec
from sdrt.errors import BackendError

from .protocol import Engine, Feeds

PATIENCE = 5.0  # seconds that a caller waits for others of the engine that is loaded


class ExclusiveSlot:
    """Engines that take turns: one of them is loaded, the others are not. It goes when another is
    needed and nobody uses it; callers of the one that is loaded go before the others, which load
    theirs less often for it, unless one of those has waited for `PATIENCE`.
    """

    def __init__(self) -> None:
        self.holder: LazyEngine | None = None
        self._users = 0
        self._changed = threading.Condition()
        self._waiting: list[tuple[LazyEngine, float]] = []

    @contextlib.contextmanager
    def taken(self, engine: "LazyEngine") -> Iterator[None]:
        """Wait until the engine may be loaded; it stays until this ends."""
        mine = engine, time.monotonic()
        with self._changed:
            self._waiting.append(mine)
            try:
                self._changed.wait_for(lambda: self._may_have(*mine))
            finally:
                self._waiting.remove(mine)
            if self.holder is not engine and self.holder is not None:
                self.holder.unload()
            self.holder = engine
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _may_have(self, engine: "LazyEngine", since: float) -> bool:
        late = time.monotonic() - PATIENCE
        if any(o is not engine and then < min(since, late) for o, then in self._waiting):
            return False
        return self._users == 0 or self.holder is engine


class LazyEngine:
    """An engine that loads when it is first needed, and where it takes turns with others goes when
    one of them is.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        component: Component | None,
        turn: ExclusiveSlot | None = None,
    ) -> None:
        """component: None if there is none, which `load` says"""
        self._load, self._component, self._turn = load, component, turn
        self._engine: Engine | None = None
        self._weights: Feeds = {}
        self._closed = False
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self._component or self.loaded()).inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self._component or self.loaded()).outputs

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        if self._turn is None:
            return self.loaded()(feeds)
        with self._turn.taken(self):
            return self._loaded_once()(feeds)

    def loaded(self) -> Engine:
        """The engine itself; raises BackendError when closed, and whatever loading it raises."""
        with self._turn.taken(self) if self._turn else contextlib.nullcontext():
            return self._loaded_once()

    def _loaded_once(self) -> Engine:
        """As `loaded`, by whoever comes first; the others wait for it."""
        with self._lock:
            if self._closed:
                raise BackendError("the pipeline is closed; load it again with sdrt.load")
            if self._engine is None:
                engine = self._load()
                try:
                    engine.refit(self._weights)
                except BaseException:
                    engine.close()
                    raise
                self._engine = engine
            return self._engine

    def refit(self, weights: Feeds) -> None:
        with self._lock:
            self._weights = weights
            if self._engine is not None:
                self._engine.refit(weights)

    def unload(self) -> None:
        """Give the memory back until it is needed again."""
        with self._lock:
            self._unloaded()

    def close(self) -> None:
        with self._lock:
            self._unloaded()
            self._closed = True

    def _unloaded(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None
