"""The engine protocol: one compiled component, called with numpy arrays.

Knows numpy. Where the bytes are between calls is the backend's business.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from sdrt.bundle.manifest import TensorSpec
from sdrt.errors import UsageError

Feeds = Mapping[str, np.ndarray]


class Engine(Protocol):
    """One compiled component."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once.

        Any number of threads may call at the same time. The returned arrays belong to the caller:
        no other call writes to them.
        """
        ...

    def refit(self, weights: Feeds) -> None:
        """Replace the stored weights of these names; all others are the stored ones again,
        whatever earlier calls replaced.

        Args:
            weights: Arrays of the stored shapes and dtypes, by name.

        Raises:
            BackendError: The backend cannot replace weights.
        """
        ...

    def close(self) -> None:
        """Release the memory; the engine cannot be called again."""
        ...


@runtime_checkable
class UnfusedAttention(Protocol):
    """An engine that may keep attention's score matrices in memory. Test with `isinstance`."""

    @property
    def keeps_scores(self) -> bool:
        """Whether it does, for want of a fused kernel."""
        ...


@runtime_checkable
class LimitedRows(Protocol):
    """An engine that was compiled for a number of rows. Test with `isinstance`."""

    @property
    def max_rows(self) -> int:
        """Most rows of a call."""
        ...


@runtime_checkable
class StaticShapes(Protocol):
    """An engine that was compiled for calls of one shape. Test with `isinstance`."""

    @property
    def static_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of its inputs, by name."""
        ...


@runtime_checkable
class ReleasableMemory(Protocol):
    """An engine that holds memory between calls to be faster. Test with `isinstance`."""

    def release_memory(self) -> None:
        """Release it, unless a call is running."""
        ...


def release_memory(engine: Engine | None) -> None:
    """Release what an engine holds between calls, if it is one that does."""
    if isinstance(engine, ReleasableMemory):
        engine.release_memory()


def check_feeds(name: str, specs: tuple[TensorSpec, ...], feeds: Feeds) -> dict[str, np.ndarray]:
    """Return the feeds as contiguous arrays of the declared dtypes.

    A named axis must have one length in all inputs of a call.

    Raises:
        UsageError: An input is missing, unknown or of another shape.
    """
    lengths: dict[str, int] = {}
    arrays = {}
    if unknown := set(feeds) - {spec.name for spec in specs}:
        raise UsageError(f"{name} has no input {', '.join(sorted(unknown))}")
    for spec in specs:
        if spec.name not in feeds:
            raise UsageError(f"{name}: input {spec.name} is missing")
        array = feeds[spec.name]
        if len(array.shape) != len(spec.shape) or not all(
            length == (lengths.setdefault(axis, length) if isinstance(axis, str) else axis)
            for axis, length in zip(spec.shape, array.shape, strict=True)
        ):
            raise UsageError(
                f"{name}: {spec.name} is {list(array.shape)}, expected {list(spec.shape)}"
            )
        arrays[spec.name] = np.ascontiguousarray(array, dtype=spec.dtype)
    return arrays
