"""The history of an image's sampling run, and the one operation on it.

Knows numpy.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

MAX_ZEROS = 2  # in a row within a range


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
        result = self.columns[column]
        is_read = any(low <= column < high for low, high in ranges)
        total: np.ndarray | float = 0.0
        for i, part in enumerate(ranges):
            if i:
                total += self._multiply(row, *part)
            else:
                total = self._multiply(row, *part, out=None if is_read else result)
        if total is not result:
            result[:] = total
        return result.reshape(self.shape)

    def _multiply(
        self, row: np.ndarray, low: int, high: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """`row[low:high] @ columns[low:high]`, in `out` if it is passed."""
        if high - low == 1:  # slow in BLAS
            return np.multiply(self.columns[low], row[low], out)
        return np.dot(row[low:high], self.columns[low:high], out)


def find_ranges(row: np.ndarray) -> list[tuple[int, int]]:
    """Find the ranges [low, high) of nonzero entries. Ranges with at most `MAX_ZEROS` zeros between
    them are joined, since multiplying those zeros costs less than another product.
    """
    edges = np.flatnonzero(np.diff(row != 0, prepend=False, append=False)).tolist()
    ranges: list[tuple[int, int]] = []
    for low, high in zip(edges[::2], edges[1::2], strict=True):
        if ranges and low - ranges[-1][1] <= MAX_ZEROS:
            low = ranges.pop()[0]
        ranges.append((low, high))
    return ranges
