"""Which evaluations of a run are computed in full, and which reuse the results of those.

Knows numbers of evaluations; not what is reused.
"""

from collections.abc import Sequence


def list_sources(
    starts: Sequence[bool], every: int, *, extrapolates: bool
) -> list[tuple[int, int | None]]:
    """List, for each evaluation, the last full one (possibly itself) and the full one before that.

    One of `every` evaluations is full. With extrapolation, the second full one comes after half
    that interval, rounded up, so that two are available sooner.

    Args:
        starts: [N], whether an evaluation must be full and nothing before it may be reused, as for
            the first one.
        every: The interval between full evaluations.
        extrapolates: Whether the others are extrapolated from two full ones.
    """
    sources: list[tuple[int, int | None]] = []
    for k, start in enumerate(starts):
        last, before = sources[-1] if sources else (k, None)
        interval = (every + 1) // 2 if extrapolates and before is None else every
        if start:
            sources.append((k, None))
        elif k - last == interval:
            sources.append((k, last))
        else:
            sources.append((last, before))
    return sources


def extrapolate(k: int, last: int, before: int | None) -> tuple[float, float]:
    """The shares of the last full evaluation and of the one before in what evaluation k reuses."""
    slope = 0.0 if before is None else (k - last) / (last - before)
    return 1.0 + slope, -slope
