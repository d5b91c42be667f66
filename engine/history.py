"""The history of an image's sampling run, and the one operation on it.

Knows numpy.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class History(Protocol):
    """The columns of one image's sampling run: starting noise, model outputs, fresh noises, and
    the latents after each evaluation.
    """

    def write(self, column: int, value: np.ndarray) -> None:
        """Store a [C, H/8, W/8] float32 array as a column."""
        ...

    def combine(self, row: np.ndarray, column: int) -> np.ndarray:
        """Store `row @ columns` as a column; row [columns] float32 -> [C, H/8, W/8] float32."""
        ...


class NumpyHistory:
    """The history in host memory. Rows have few nonzero entries, mostly adjacent."""

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
            for low, high in _consecutive_ranges(np.flatnonzero(row).tolist())
        ]
        self.columns[column] = sum(parts[1:], parts[0]) if parts else 0.0
        return self.columns[column].reshape(self.shape)


def _consecutive_ranges(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges [low, high) of consecutive indices."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[start], indices[i - 1] + 1
            start = i
