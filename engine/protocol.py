"""What a backend is: an `Engine` that runs a component and a `History` that combines latents.

Knows numpy. Everything that crosses this line is a numpy array; where the bytes live meanwhile
is the backend's own business.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sdrt.bundle import TensorSpec
from sdrt.errors import UsageError

Feeds = Mapping[str, np.ndarray]


class Engine(Protocol):
    """One compiled component."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; the arrays returned are valid until the next call."""
        ...

    def close(self) -> None:
        """Give the memory back; the engine cannot be called again."""
        ...


class History(Protocol):
    """The columns of one image's sampling run: its starting noise, fresh noises, model outputs."""

    def write(self, column: int, value: np.ndarray) -> None:
        """Keep a [C, H/8, W/8] float32 array as a column."""
        ...

    def combine(self, row: np.ndarray) -> np.ndarray:
        """`row @ columns` -> [C, H/8, W/8] float32; row is [columns] float32."""
        ...


class NumpyHistory:
    """The history in host memory; one BLAS call combines it."""

    def __init__(self, columns: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.columns = np.zeros((columns, int(np.prod(shape))), np.float32)

    def write(self, column: int, value: np.ndarray) -> None:
        self.columns[column] = value.reshape(-1)

    def combine(self, row: np.ndarray) -> np.ndarray:
        used = len(row)
        while used and row[used - 1] == 0.0:
            used -= 1
        combined: np.ndarray = row[:used] @ self.columns[:used]
        return combined.reshape(self.shape)


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
