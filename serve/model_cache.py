"""Which models are in memory: loads them on first use, and evicts the least recently used ones so
that their sizes stay within a budget.

Knows names, sizes and two functions that load and unload; not engines or HTTP. One thread loads
one model at a time, in the order in which models were first asked for. A model is evicted once
nobody uses it. Until then its new users wait, behind the model that takes its room.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

from sdrt.errors import UsageError
from sdrt.runtime.batching.request import RequestRejected
from sdrt.runtime.process_memory import format_bytes

log = logging.getLogger("sdrt.serve")

RETRY_AFTER_SECONDS = 5.0
MISFIT_RETRY_SECONDS = 30.0
CLOSE_SECONDS = 10.0


class Residence(Enum):
    """Where a model is. EVICTING: loaded, but only until its users are finished."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    EVICTING = "evicting"
    UNLOADING = "unloading"


@dataclass(slots=True)
class _Entry:
    """One model. size_bytes: the estimate, or more if loading took more"""

    estimated_bytes: int
    size_bytes: int
    residence: Residence = Residence.UNLOADED
    users: int = 0
    last_used: int = 0
    waiting: list["Future[None]"] = field(default_factory=list)

    @property
    def is_requested(self) -> bool:
        return any(not future.cancelled() for future in self.waiting)


class ModelCache:
    """Loads and evicts models; its methods may be called from every thread."""

    def __init__(
        self,
        estimates: Mapping[str, int],
        budget_bytes: int,
        pinned: Collection[str],
        load: Callable[[str], int],
        unload: Callable[[str], None],
        max_waiting: int,
    ) -> None:
        """Nothing is loaded before `start`.

        Args:
            estimates: The bytes that each model needs, by name.
            budget_bytes: What the loaded models may need together.
            pinned: Names of models that are never evicted.
            load: Loads a model and returns the bytes that this took.
            unload: Frees a model that nobody uses.
            max_waiting: Requests that wait for one model.

        Raises:
            UsageError: A pinned model is unknown, or a model can never fit.
        """
        self.budget_bytes, self.pinned = budget_bytes, frozenset(pinned)
        self._entries = {name: _Entry(size, size) for name, size in estimates.items()}
        self._load_model, self._unload_model, self._max_waiting = load, unload, max_waiting
        self._changed = threading.Condition()
        self._queue: deque[str] = deque()
        self._clock = itertools.count(1)
        self._acquired = 0  # how often models were taken into use
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sdrt-models", daemon=True)
        if unknown := self.pinned - estimates.keys():
            raise UsageError(
                f"--pin {min(unknown)}: unknown model",
                hint=f"expected one of {', '.join(estimates)}",
            )
        for name in estimates:
            if reason := self._explain_misfit(name):
                raise UsageError(reason, hint="raise --memory-budget, or serve fewer models")

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Reject everybody who waits, and load nothing more. Loaded models stay as they are."""
        with self._changed:
            self._closed = True
            for entry in self._entries.values():
                _reject(
                    entry,
                    _shutting_down(),
                )
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def request(self, name: str) -> "Future[None]":
        """Ask for a model; the future is done once it is loaded and in use by the caller, who
        calls `release` in the end, or `withdraw` instead of waiting.

        Raises:
            RequestRejected: Too many wait for the model, or it does not fit into the budget.
        """
        future: Future[None] = Future()
        with self._changed:
            entry = self._entries[name]
            if self._closed:
                raise _shutting_down()
            if entry.residence is Residence.LOADED:
                self._take_into_use(entry)
                future.set_result(None)
                return future
            if reason := self._explain_misfit(name):
                raise RequestRejected("memory", reason, MISFIT_RETRY_SECONDS)
            if len(entry.waiting) >= self._max_waiting:
                raise RequestRejected(
                    "queue",
                    f"{len(entry.waiting)} requests wait until model {name} is loaded",
                    RETRY_AFTER_SECONDS,
                )
            entry.waiting.append(future)
            if name not in self._queue and entry.residence is not Residence.LOADING:
                self._queue.append(name)
            self._changed.notify_all()
        return future

    def hold(self, name: str) -> None:
        """Count one more user of a model that the caller uses."""
        with self._changed:
            self._take_into_use(self._entries[name])

    def release(self, name: str) -> None:
        """Count one user less."""
        with self._changed:
            self._entries[name].users -= 1
            self._entries[name].last_used = next(self._clock)
            self._changed.notify_all()

    def withdraw(self, name: str, future: "Future[None]") -> None:
        """Stop waiting; releases the model if it has been loaded in the meantime."""
        with self._changed:
            if future.cancel():
                waiting = self._entries[name].waiting
                waiting[:] = [other for other in waiting if other is not future]
                self._changed.notify_all()
            elif future.exception() is None:
                self.release(name)

    def evict_idle(self, name: str) -> bool:
        """Unload a model now unless it is in use; returns whether it is not in memory."""
        with self._changed:
            entry = self._entries[name]
            if entry.residence is not Residence.LOADED or entry.users:
                return entry.residence is Residence.UNLOADED
        self._unload(name, only_if_idle=True)
        return self.residence(name) is Residence.UNLOADED

    def residence(self, name: str) -> Residence:
        return self._entries[name].residence

    def size_bytes(self, name: str) -> int:
        """What a model needs: the estimate, or more if loading it took more."""
        return self._entries[name].size_bytes

    def _take_into_use(self, entry: _Entry) -> None:
        entry.users += 1
        entry.last_used = next(self._clock)
        self._acquired += 1

    def _explain_misfit(self, name: str) -> str | None:
        """Why a model cannot be loaded even if all others that may be evicted are; None if it
        can.
        """
        pinned = sum(self._entries[other].size_bytes for other in self.pinned - {name})
        needed = self._entries[name].size_bytes
        if needed + pinned <= self.budget_bytes:
            return None
        others = f", pinned models {format_bytes(pinned)}" if pinned else ""
        return (
            f"model {name} needs {format_bytes(needed)}{others}; the memory budget is "
            f"{format_bytes(self.budget_bytes)}"
        )

    def _work(self) -> None:
        """Thread: load the models that are asked for, in turn."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                name = self._queue.popleft()
            if self._make_room(name):
                self._load(name)

    def _make_room(self, name: str) -> bool:
        """Evict others until a model fits, which is LOADING from then on. Returns False, and evicts
        nothing more, once nobody waits for it.
        """
        entry = self._entries[name]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._can_proceed(name))
                if reason := self._explain_misfit(name):  # a pinned model took more than estimated
                    _reject(entry, RequestRejected("memory", reason, MISFIT_RETRY_SECONDS))
                if self._closed or not entry.is_requested:
                    self._call_off()
                    return False
                victim = self._idle_victim()
                if self._excess(name) <= 0 or victim is None:
                    entry.residence = Residence.LOADING
                    self._call_off()
                    return True
            self._unload(victim)

    def _can_proceed(self, name: str) -> bool:
        """Choose what to evict, and return whether there is anything to do now."""
        if not self._entries[name].is_requested or self._explain_misfit(name):
            return True
        if self._entries[name].residence is Residence.UNLOADING:
            return False
        self._choose_victims(name)
        return self._excess(name) <= 0 or self._idle_victim() is not None

    def _excess(self, name: str) -> int:
        """Bytes above the budget, with this model loaded."""
        loaded = (
            entry.size_bytes
            for other, entry in self._entries.items()
            if entry.residence is not Residence.UNLOADED or other == name
        )
        return sum(loaded) - self.budget_bytes

    def _choose_victims(self, name: str) -> None:
        """Mark models EVICTING until the others fit: idle ones first, least recently used ones
        first.
        """
        leaving = (Residence.EVICTING, Residence.UNLOADING)
        excess = self._excess(name) - sum(
            entry.size_bytes for entry in self._entries.values() if entry.residence in leaving
        )
        candidates = [
            entry
            for other, entry in self._entries.items()
            if entry.residence is Residence.LOADED and other not in (*self.pinned, name)
        ]
        for entry in sorted(candidates, key=lambda entry: (entry.users > 0, entry.last_used)):
            if excess <= 0:
                return
            entry.residence = Residence.EVICTING
            excess -= entry.size_bytes

    def _idle_victim(self) -> str | None:
        return next(
            (
                name
                for name, entry in self._entries.items()
                if entry.residence is Residence.EVICTING and not entry.users
            ),
            None,
        )

    def _call_off(self) -> None:
        """Let the models that need not be evicted any more be used again."""
        for name, entry in self._entries.items():
            if entry.residence is Residence.EVICTING:
                self._make_available(name)

    def _make_available(self, name: str) -> None:
        """A loaded model goes to those who wait for it."""
        entry = self._entries[name]
        entry.residence, waiting = Residence.LOADED, entry.waiting
        entry.waiting = []
        entry.last_used = next(self._clock)
        if name in self._queue:
            self._queue.remove(name)
        for future in waiting:
            if future.set_running_or_notify_cancel():
                self._take_into_use(entry)
                future.set_result(None)

    def _unload(self, name: str, only_if_idle: bool = False) -> None:
        entry = self._entries[name]
        with self._changed:
            if only_if_idle and (entry.residence is not Residence.LOADED or entry.users):
                return
            entry.residence = Residence.UNLOADING
        try:
            self._unload_model(name)
        finally:
            with self._changed:
                entry.residence = Residence.UNLOADED
                if entry.is_requested and name not in self._queue:
                    self._queue.append(name)
                self._changed.notify_all()

    def _load(self, name: str) -> None:
        entry = self._entries[name]
        before = self._use_marks()
        try:
            measured = self._load_model(name)
        except Exception as error:
            with self._changed:
                entry.residence = Residence.UNLOADED
                _reject(entry, error)
            return
        with self._changed:
            if before == self._use_marks() and not before[1]:  # else others took memory meanwhile
                entry.size_bytes = max(entry.estimated_bytes, measured)
            reason = self._explain_misfit(name)
        if reason is None:
            self._fit_loaded(name)
            return
        self._unload(name)
        with self._changed:
            _reject(entry, RequestRejected("memory", reason, MISFIT_RETRY_SECONDS))

    def _use_marks(self) -> tuple[int, int]:
        return self._acquired, sum(entry.users for entry in self._entries.values())

    def _fit_loaded(self, name: str) -> None:
        """Evict others if a model took more than was estimated, then let it be used."""
        while True:
            with self._changed:
                self._choose_victims(name)
                self._changed.wait_for(
                    lambda: self._closed or self._excess(name) <= 0 or self._idle_victim()
                )
                victim = self._idle_victim()
                if self._closed or self._excess(name) <= 0 or victim is None:
                    self._call_off()
                    self._make_available(name)
                    return
            self._unload(victim)


def _shutting_down() -> RequestRejected:
    return RequestRejected("draining", "the server is shutting down", 30.0)


def _reject(entry: _Entry, error: Exception) -> None:
    """Tell everybody who waits for a model why there is none."""
    waiting, entry.waiting = entry.waiting, []
    for future in waiting:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
