"""Engines that load on first use, and of which only one may be loaded at a time.

Knows the engine protocol; no backend.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from sdrt.bundle.manifest import Component, TensorSpec
from sdrt.errors import BackendError

from .protocol import Engine, Feeds, release_memory

MAX_WAIT = 5.0  # seconds, before a waiting engine takes precedence


class ExclusiveSlot:
    """A slot for one loaded engine of several. It is unloaded when another is needed and no call
    uses it. Calls of the loaded engine take precedence, which saves loads, unless another engine
    has waited for `MAX_WAIT` seconds.
    """

    def __init__(self) -> None:
        self.holder: LazyEngine | None = None
        self._users = 0
        self._changed = threading.Condition()
        self._waiting: list[tuple[LazyEngine, float]] = []

    @contextlib.contextmanager
    def acquire(self, engine: "LazyEngine") -> Iterator[None]:
        """Wait until the engine may be loaded; it stays loaded inside the block."""
        request = engine, time.monotonic()
        with self._changed:
            self._waiting.append(request)
            try:
                self._changed.wait_for(lambda: self._may_acquire(*request))
            finally:
                self._waiting.remove(request)
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

    def _may_acquire(self, engine: "LazyEngine", since: float) -> bool:
        late = time.monotonic() - MAX_WAIT
        if any(o is not engine and then < min(since, late) for o, then in self._waiting):
            return False
        return self._users == 0 or self.holder is engine


class LazyEngine:
    """An engine that loads on first use; with a slot, until another engine needs the slot."""

    def __init__(
        self,
        load: Callable[[], Engine],
        component: Component | None,
        slot: ExclusiveSlot | None = None,
    ) -> None:
        """component: None if the bundle has none, which `load` then raises"""
        self._load, self._component, self._slot = load, component, slot
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
        if self._slot is None:
            return self.loaded()(feeds)
        with self._slot.acquire(self):
            return self._get_or_load()(feeds)

    def warm_up(self) -> None:
        """Load the engine now, unless another may have to make room for it."""
        if self._slot is None:
            self._get_or_load()

    def loaded(self) -> Engine:
        """The engine itself; raises BackendError when closed, and whatever loading it raises."""
        with self._slot.acquire(self) if self._slot else contextlib.nullcontext():
            return self._get_or_load()

    def _get_or_load(self) -> Engine:
        """Load unless it is loaded; concurrent callers wait."""
        with self._lock:
            if self._closed:
                raise BackendError("the pipeline is closed", hint="load it again with sdrt.load")
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

    def release_memory(self) -> None:
        """See `ReleasableMemory`."""
        release_memory(self._engine)

    def unload(self) -> None:
        """Release the memory until the engine is needed again."""
        with self._lock:
            self._unload()

    def close(self) -> None:
        with self._lock:
            self._unload()
            self._closed = True

    def _unload(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None
