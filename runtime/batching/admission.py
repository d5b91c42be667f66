"""Admission: which requests are accepted, so that every accepted deadline can be met.

Knows the scheduler's estimates and free memory; not how requests run.
"""

from collections.abc import Sequence

from .cost_model import CostModel
from .request import RequestRejected
from .scheduler import (
    CostEstimates,
    ScheduledRequest,
    estimate_finish_times,
    estimate_lateness,
)

MEMORY_RETRY_SECONDS = 10.0


def check_memory_for(request: ScheduledRequest, costs: CostModel) -> None:
    """Raise RequestRejected if a call for one of the request's passes does not fit into memory."""
    size = request.batch_key[0]  # type: ignore[index]
    if missing := costs.missing_bytes(size, request.num_rows):
        raise RequestRejected(
            "memory", f"not enough memory: {missing / 1e6:.0f} MB missing", MEMORY_RETRY_SECONDS
        )
    if request.later_pass:
        check_memory_for(request.start_later_pass(), costs)


def check_queue(
    num_new: int,
    num_waiting: int,
    max_waiting: int,
    others: Sequence[ScheduledRequest],
    now: float,
    estimates: CostEstimates,
    slots: int,
) -> None:
    """Raise RequestRejected if the waiting queue has no room for new requests."""
    if num_waiting + num_new <= max_waiting:
        return
    finished = estimate_finish_times(others, now, estimates, slots)
    raise RequestRejected(
        "queue",
        f"the queue is full: {num_waiting} of {max_waiting} images waiting",
        min(finished, default=now) - now,
    )


def check_deadlines(
    new: Sequence[ScheduledRequest],
    others: Sequence[ScheduledRequest],
    now: float,
    estimates: CostEstimates,
    slots: int,
) -> None:
    """Raise RequestRejected if the new requests would miss their deadline, or make an accepted
    one miss its own.
    """
    requests = [*others, *new]
    if not any(request.has_deadline for request in requests):
        return
    late = estimate_lateness(requests, now, estimates, slots)
    if new[0].has_deadline and (by := max(late[len(others) :])) > 0.0:
        raise RequestRejected(
            "deadline", f"the deadline cannot be met: estimated {by:.2g} s late", by
        )
    if not any(other.has_deadline and by > 0.0 for other, by in zip(others, late, strict=False)):
        return
    before = estimate_lateness(others, now, estimates, slots)
    for other, by, was in zip(others, late, before, strict=False):
        if other.has_deadline and was <= 0.0 < by:
            message = "accepting this request would miss the deadline of an earlier one"
            raise RequestRejected("deadline", message, other.deadline - now)
