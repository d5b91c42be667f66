"""The history of an image's sampling run, and the one operation on it.

Knows numpy.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class History(Protocol):
    """The columns of one image's sampling run: starting noise, model outputs, fresh noises, and
    the latents after each evaluation.
    """

    def write(self, column: int, values: np.ndarray) -> None:
        """Store a [C, H/8, W/8] float32 array as a column, or [n, C, H/8, W/8] as n of them."""
        ...

    def combine(
        self, row: np.ndarray, ranges: Sequence[tuple[int, int]], column: int
    ) -> np.ndarray:
        """Store `row @ columns` as a column.

        Args:
            row: [columns] float32.
            ranges: Of the row's nonzero entries, from `find_ranges`.
            column: Where the result is stored.

        Returns:
            The result [C, H/8, W/8] float32.
        """
        ...


class NumpyHistory:
    """The history in host memory. Rows have few nonzero entries, mostly adjacent."""

    def __init__(self, columns: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.columns = np.zeros((columns, int(np.prod(shape))), np.float32)

    def write(self, column: int, values: np.ndarray) -> None:
        flat = values.reshape(-1, self.columns.shape[1])
        self.columns[column : column + len(flat)] = flat

    def combine(
        self, row: np.ndarray, ranges: Sequence[tuple[int, int]], column: int
    ) -> np.ndarray:
        parts = [
            row[low:high] @ self.columns[low:high]
            if high - low > 1
            else row[low] * self.columns[low]  # a product of one row is slow in BLAS
            for low, high in ranges
        ]
        self.columns[column] = sum(parts[1:], parts[0]) if parts else 0.0
        return self.columns[column].reshape(self.shape)


def find_ranges(row: np.ndarray) -> list[tuple[int, int]]:
    """Ranges [low, high) of consecutive nonzero entries."""
    edges = np.flatnonzero(np.diff(row != 0, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
