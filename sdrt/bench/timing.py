"""What a worker times and how the seconds of its parts are added up. Knows no contestant."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

PROMPT = "a red circle on a blue background"

Part = Callable[[], object]
Spent = defaultdict[str, float]  # seconds by name


class Timed:
    """Something that is called, and the seconds that its calls took, added up under a name."""

    def __init__(self, inner: Any, name: str, spent: Spent) -> None:
        self._inner, self._name, self._spent = inner, name, spent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(self._inner, *args, **kwargs)

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self._spent[self._name] += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        # What runs a whole schedule in one call; see `engine.protocol.Sampler`.
        return partial(self._timed, found) if name == "run_program" else found


def picture_of(steps: int) -> str:
    """The name of the part that draws a whole picture."""
    return f"picture, {steps} steps"
