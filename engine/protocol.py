"""What a backend is: an `Engine` that runs a component and a `History` that combines latents.

Knows numpy. Everything that crosses this line is a numpy array; where the bytes live meanwhile
is the backend's own business.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdrt.bundle.manifest import Component, TensorSpec
from sdrt.errors import BackendError, UsageError

Feeds = Mapping[str, np.ndarray]
PATIENCE = 5.0  # seconds that a caller waits for others of the engine that is loaded


class Engine(Protocol):
    """One compiled component."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; any number of threads may call at the same time. The arrays returned are the
        caller's own: no other call writes to them.
        """
        ...

    def refit(self, weights: Feeds) -> None:
        """Compute with these in place of the stored weights of these names, of their shapes and
        dtypes, and with the stored ones for all others, whatever was given before.

        Raises BackendError if the backend does not take them.
        """
        ...

    def close(self) -> None:
        """Give the memory back; the engine cannot be called again."""
        ...


@dataclass(frozen=True, slots=True)
class Read:
    """Text that a text encoder reads in the same run, in place of the UNet's input `context`.

    ids: [B, 2 or 1, stretches, tokens] int32; weights: alike, float32, of every token
    skip: layers left out at the end
    """

    ids: np.ndarray
    weights: np.ndarray
    skip: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """What becomes of a schedule.

    latents: [B, C, H/8, W/8] float32
    pixels: [B, H, W, 3] uint8, where it was decoded too
    good: of each, whether all of the decoder's numbers were finite
    """

    latents: np.ndarray
    pixels: np.ndarray | None = None
    good: Sequence[bool] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """A whole run of B pictures in N evaluations, all numbers known: what a backend that decides
    nothing in between needs. Rows of the model are laid out picture by picture.

    columns: [B, places, C, H/8, W/8] float32, with the starting noise and whatever is given
    rows: [N + 1, B, places] float32, how every input and the result are mixed
    timesteps: [N, B] float32
    used: rows of a picture in every evaluation, 2 where it is guided
    per: places of one evaluation's output; the last is the prompt's
    output_places [N], state_places [N + 1]: where outputs and mixtures are kept
    told: [B, 2 or 1, ..] of every other input; the last row is the prompt's
    beside: [B, E, H/8, W/8] channels beside the latents
    read: what the text encoder reads first, if it does
    """

    columns: np.ndarray
    rows: np.ndarray
    timesteps: np.ndarray
    used: tuple[int, ...]
    per: int
    output_places: tuple[int, ...]
    state_places: tuple[int, ...]
    told: Feeds
    beside: np.ndarray
    read: Read | None = None

    @property
    def layout(self) -> tuple[object, ...]:
        """What two schedules share that one CUDA graph serves."""
        shapes = tuple(value.shape for value in self.told.values())
        places = self.used, self.per, self.output_places, self.state_places
        read = self.read and (self.read.ids.shape, self.read.skip)
        return self.columns.shape, self.rows.shape, self.beside.shape, shapes, places, read


class Sampler(Protocol):
    """A UNet's engine that also runs a whole schedule."""

    def drawn(self, schedule: Schedule, encoder: Engine | None, decoder: Engine | None) -> Drawn:
        """Run it, after the text encoder where the schedule has text, before the decoder where one
        is given; both are engines of the same backend.
        """
        ...


class Turn:
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
        self, load: Callable[[], Engine], component: Component | None, turn: Turn | None = None
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


class History(Protocol):
    """The columns of one image's sampling run: starting noise, model outputs, fresh noises, and
    the latents after each evaluation.
    """

    def write(self, column: int, value: np.ndarray) -> None:
        """Keep a [C, H/8, W/8] float32 array as a column."""
        ...

    def combine(self, row: np.ndarray, column: int) -> np.ndarray:
        """`row @ columns` -> [C, H/8, W/8] float32, kept as a column; row is [columns] float32."""
        ...


class NumpyHistory:
    """The history in host memory. Rows have few entries, most of them side by side."""

    def __init__(self, columns: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.columns = np.zeros((columns, int(np.prod(shape))), np.float32)

    def write(self, column: int, value: np.ndarray) -> None:
        self.columns[column] = value.reshape(-1)

    def combine(self, row: np.ndarray, column: int) -> np.ndarray:
        parts = [
            row[low:high] @ self.columns[low:high]
            if high - low > 1
            else row[low] * self.columns[low]  # a product of one row is slow in BLAS
            for low, high in _runs(np.flatnonzero(row).tolist())
        ]
        self.columns[column] = sum(parts[1:], parts[0]) if parts else 0.0
        return self.columns[column].reshape(self.shape)


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Stretches [low, high) of indices that follow one another."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[start], indices[i - 1] + 1
            start = i


def checked_feeds(name: str, specs: tuple[TensorSpec, ...], feeds: Feeds) -> dict[str, np.ndarray]:
    """The feeds as contiguous arrays of the declared dtypes; raises UsageError where they misfit.

    A named axis must have one length in all inputs of the call.
    """
    axes: dict[str, int] = {}
    ready = {}
    if unknown := set(feeds) - {spec.name for spec in specs}:
        raise UsageError(f"{name} has no input {', '.join(sorted(unknown))}")
    for spec in specs:
        if spec.name not in feeds:
            raise UsageError(f"{name} was not given its input {spec.name}")
        array = feeds[spec.name]
        if len(array.shape) != len(spec.shape) or not all(
            length == (axes.setdefault(axis, length) if isinstance(axis, str) else axis)
            for axis, length in zip(spec.shape, array.shape, strict=True)
        ):
            raise UsageError(
                f"{name}: {spec.name} is {list(array.shape)}, expected {list(spec.shape)}"
            )
        ready[spec.name] = np.ascontiguousarray(array, dtype=spec.dtype)
    return ready
