"""How work grows with its input: by the processor time of two sizes, which a busy machine hardly
changes, and their ratio, which a slow machine does not.
"""

import time
from collections.abc import Callable

TIMES = 8  # larger
LINEAR = 24.0  # the ratio is 8 for linear work, 64 for quadratic
LONG = 0.5  # seconds; not repeated
SHORTEST = 1e-3  # seconds; below, caches and allocations decide


def growth(work: Callable[[int], object], size: int) -> float:
    """The ratio of the processor times of `work(8 * size)` and `work(size)`."""
    return quickest(work, TIMES * size) / max(quickest(work, size), SHORTEST)


def quickest(work: Callable[[int], object], size: int) -> float:
    """Seconds of this thread on the processor: the least of three, or one long one."""
    best = seconds(work, size)
    for _ in range(2):
        if best < LONG:
            best = min(best, seconds(work, size))
    return best


def seconds(work: Callable[[int], object], size: int) -> float:
    began = time.thread_time()
    work(size)
    return time.thread_time() - began
