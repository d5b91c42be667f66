"""How work grows with its input: by the processor time of two sizes, which a busy machine hardly
changes, and their ratio, which a slow machine does not.
"""

import time
from collections.abc import Callable

TIMES = 8  # larger
LINEAR = 24.0  # the ratio is 8 for linear work, 64 for quadratic
LONG = 0.5  # seconds; not repeated more than once
SHORTEST = 1e-3  # seconds; below, caches and allocations decide


def growth(work: Callable[[int], object], size: int) -> float:
    """The ratio of the processor times of `work(8 * size)` and `work(size)`."""
    return quickest(work, TIMES * size) / max(quickest(work, size), SHORTEST)


def quickest(work: Callable[[int], object], size: int) -> float:
    """Seconds of this thread on the processor: the least of three, or of two long ones."""
    best = min(seconds(work, size) for _ in range(2))
    return best if best >= LONG else min(best, seconds(work, size))


def seconds(work: Callable[[int], object], size: int) -> float:
    began = time.thread_time()
    work(size)
    return time.thread_time() - began
