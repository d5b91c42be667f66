"""What a worker times, and how the seconds of an image's parts add up. Knows no contestant."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import numpy as np

from sdrt.bundle.manifest import TensorSpec
from sdrt.engine import Engine, Feeds, ProgramEngine, SamplingProgram, SamplingResult
from sdrt.engine.protocol import UnfusedAttention, release_memory

PROMPT = "a red circle on a blue background"

Part = Callable[[], object]
Seconds = defaultdict[str, float]  # by part
RunProgram = Callable[[SamplingProgram, Engine | None, Engine | None], SamplingResult]
Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


@contextmanager
def timed(part: str, seconds: Seconds) -> Iterator[None]:
    """Add the time that the block takes to a part's seconds."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] += time.perf_counter() - began


def time_calls(
    function: Callable[Arguments, Value], part: str, seconds: Seconds
) -> Callable[Arguments, Value]:
    """The function, whose calls add to a part's seconds."""

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
        with timed(part, seconds):
            return function(*args, **kwargs)

    return call


class TimedEngine:
    """An engine whose calls add to a part's seconds."""

    def __init__(self, engine: Engine, part: str, seconds: Seconds) -> None:
        self.engine, self._part, self._seconds = engine, part, seconds

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.engine.outputs

    @property
    def keeps_scores(self) -> bool:
        return isinstance(self.engine, UnfusedAttention) and self.engine.keeps_scores

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        with timed(self._part, self._seconds):
            return self.engine(feeds)

    def refit(self, weights: Feeds) -> None:
        self.engine.refit(weights)

    def release_memory(self) -> None:
        release_memory(self.engine)

    def close(self) -> None:
        self.engine.close()


class TimedProgramEngine(TimedEngine):
    """An engine that runs complete programs. A program's time cannot be divided: all of it counts
    as the engine's own.
    """

    def __init__(self, engine: Engine, run: RunProgram, part: str, seconds: Seconds) -> None:
        super().__init__(engine, part, seconds)
        self._run_program = run

    def run_program(
        self, program: SamplingProgram, encoder: Engine | None, decoder: Engine | None
    ) -> SamplingResult:
        with timed(self._part, self._seconds):
            return self._run_program(program, _inner(encoder), _inner(decoder))


def time_engine(engine: Engine, part: str, seconds: Seconds) -> TimedEngine:
    """The engine, timed in every way in which it can run."""
    if isinstance(engine, ProgramEngine):
        return TimedProgramEngine(engine, engine.run_program, part, seconds)
    return TimedEngine(engine, part, seconds)


def _inner(engine: Engine | None) -> Engine | None:
    """Backends run their own engines in a program, not wrappers."""
    return engine.engine if isinstance(engine, TimedEngine) else engine


def image_part(steps: int) -> str:
    """The name of the part that generates a complete image."""
    return f"picture, {steps} steps"
