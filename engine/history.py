"""The columns of an image's sampling run, and the one operation on them.

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
