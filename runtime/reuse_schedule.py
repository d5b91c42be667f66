"""Which evaluations of a run are computed in full where others reuse what those computed.

Knows numbers of evaluations; not what is reused.
"""

from collections.abc import Sequence


def list_sources(
    starts: Sequence[bool], every: int, *, extrapolates: bool
) -> list[tuple[int, int | None]]:
    """Of each evaluation, the last full one, which may be itself, and the full one before that.

    One of `every` evaluations is full. Where they are extrapolated the second full one comes after
    half as many, rounded up, so that there are two sooner.

    Args:
        starts: [N], whether an evaluation must be full and nothing from before it be used, as the
            first one.
        every: From one full evaluation to the next.
        extrapolates: Whether later evaluations read two.
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
