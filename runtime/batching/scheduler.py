"""The scheduler: which requests in flight share the next call of the model.

- Within a priority the earliest deadline goes first. A request without a deadline gets one at
  `DEFAULT_SLOWDOWN` times the seconds it would take alone, so short requests pass long ones and
  nothing starves.
- A request rises by one priority for every `PRIORITY_SECONDS` it has waited.
- A request that is passed over keeps its latents and goes on later, at no cost.

Knows numbers about requests, not images: the same rules run the batcher, estimate finish times and
simulate fleets.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

DEFAULT_SLOWDOWN = 4.0
PRIORITY_SECONDS = 30.0
SAFETY_FACTOR = 1.1  # of an estimate, before a deadline is rejected
BUSY_FRACTION = 1 / 3  # of the slots in use, from where throughput shortens waits the most


@dataclass(frozen=True, slots=True)
class ScheduledPass:
    """A pass at another size that a request goes through after its current one.

    Attributes:
        batch_key: Of its evaluations.
        num_rows: Of its first evaluation.
        evaluations: In all.
        full_fraction: Fraction of its evaluations that run the full model.
    """

    batch_key: Hashable
    num_rows: int
    evaluations: int
    full_fraction: float = 1.0


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """What the scheduler knows of a request, which is one image.

    Attributes:
        batch_key: Requests with the same key can share a call if they also run the same component.
        num_rows: Rows of its next evaluation in the model's batch.
        evaluations_left: Model evaluations until this pass is denoised.
        submitted: Seconds on the caller's clock.
        deadline: Seconds on the caller's clock.
        priority: Larger goes first.
        has_deadline: Whether the caller set the deadline.
        started: Whether it has a slot.
        component: The network that its next evaluation runs.
        full_fraction: Fraction of its evaluations that run the full model; the others run its
            shallow part.
        later_pass: The pass that follows, if any.
        control_cost: Of its ControlNets, relative to the model, on average over its evaluations.
        image_tokens: Of its image prompt; 0 without, which shares calls with any number.
        graph: That its evaluations need instead of the component's plain one; "" for none, which
            shares calls with any, as zeros for its inputs are as none.
    """

    batch_key: Hashable
    num_rows: int
    evaluations_left: int
    submitted: float
    deadline: float
    priority: int = 0
    has_deadline: bool = False
    started: bool = False
    component: str = "unet"
    full_fraction: float = 1.0
    later_pass: ScheduledPass | None = None
    control_cost: float = 0.0
    image_tokens: int = 0
    graph: str = ""

    @property
    def total_evaluations_left(self) -> int:
        """Of all passes."""
        later = self.later_pass.evaluations if self.later_pass else 0
        return self.evaluations_left + later

    def start_later_pass(self) -> "ScheduledRequest":
        """The request in its later pass, with the deadline and priority that it has."""
        later = self.later_pass
        assert later is not None
        return replace(
            self,
            batch_key=later.batch_key,
            num_rows=later.num_rows,
            evaluations_left=later.evaluations,
            full_fraction=later.full_fraction,
            component="unet",
            later_pass=None,
        )

    def sort_key(self, now: float) -> tuple[float, float, float]:
        """The smallest goes first."""
        priority = self.priority + max(0.0, now - self.submitted) // PRIORITY_SECONDS
        return (-priority, self.deadline, self.submitted)


def set_deadlines_in_order(requests: Sequence[ScheduledRequest]) -> None:
    """Let no request of a call go before an earlier one: they are prepared in order. Its default
    deadline may be earlier, for its prompt has fewer rows, or costs were measured in between.
    """
    deadlines = accumulate((request.deadline for request in requests), max)
    for request, deadline in zip(requests, deadlines, strict=True):
        request.deadline = deadline


def select_batch(
    ordered: Sequence[ScheduledRequest], max_rows: Callable[[Hashable], int]
) -> list[ScheduledRequest]:
    """The first request, and those after it that fit into the same call of the model.

    Args:
        ordered: Requests that are ready for an evaluation, in order; at least one.
        max_rows: The rows of a call, by batch key. A first request with more runs alone.
    """
    first = ordered[0]
    free, batch = max(max_rows(first.batch_key), first.num_rows), []
    tokens, graph = 0, ""
    for request in ordered:
        same = request.batch_key == first.batch_key and request.component == first.component
        alike = not (tokens and request.image_tokens) or request.image_tokens == tokens
        alike = alike and (not (graph and request.graph) or request.graph == graph)
        if same and alike and request.num_rows <= free:
            batch.append(request)
            free -= request.num_rows
            tokens, graph = tokens or request.image_tokens, graph or request.graph
    return batch


@dataclass(frozen=True, slots=True)
class CostEstimates:
    """Estimated costs by batch key, in seconds.

    Attributes:
        call_seconds: Of a call of the model, by batch key and rows.
        max_rows: Rows of a call, by batch key.
        prepare_seconds: From a slot to the first evaluation.
        decode_seconds: From the last evaluation to the image.
        shallow_ratio: A call of the model's shallow part relative to one of the full model.
        control_ratio: What control takes, relative to its `control_cost`.
        full_rows: Rows of a call while the batcher is busy; by default `max_rows`.
    """

    call_seconds: Callable[[Hashable, int], float]
    max_rows: Callable[[Hashable], int]
    prepare_seconds: Callable[[Hashable], float]
    decode_seconds: Callable[[Hashable], float]
    shallow_ratio: Callable[[Hashable], float] = lambda _: 1.0
    control_ratio: Callable[[Hashable], float] = lambda _: 1.0
    full_rows: Callable[[Hashable], int] | None = None

    def row_limit(self, running: int, slots: int) -> Callable[[Hashable], int]:
        """The rows of a call, by batch key. Small calls let short requests pass long ones; when
        many requests run, they wait for each other, and the best throughput serves all of them.
        """
        is_busy = running > BUSY_FRACTION * slots
        return self.full_rows if is_busy and self.full_rows else self.max_rows

    def evaluation_seconds(self, batch: Sequence[ScheduledRequest]) -> float:
        """Seconds of a call that a batch shares, on average over its evaluations."""
        key, full = batch[0].batch_key, max(request.full_fraction for request in batch)
        rows = sum(request.num_rows for request in batch)
        control = sum(request.num_rows * request.control_cost for request in batch) / rows
        relative = full + (1.0 - full) * self.shallow_ratio(key)
        return self.call_seconds(key, rows) * (relative + control * self.control_ratio(key))

    def solo_seconds(self, request: ScheduledRequest) -> float:
        """Seconds that a request takes if nothing else runs."""
        key, evaluations = request.batch_key, request.evaluations_left
        denoising = evaluations * self.evaluation_seconds([request])
        seconds = self.prepare_seconds(key) + denoising + self.decode_seconds(key)
        if request.later_pass:
            seconds += self.solo_seconds(request.start_later_pass())
        return seconds

    def default_deadline(self, request: ScheduledRequest) -> float:
        """The deadline of a request whose caller set none."""
        return request.submitted + DEFAULT_SLOWDOWN * self.solo_seconds(request)


def estimate_finish_times(
    requests: Sequence[ScheduledRequest], now: float, estimates: CostEstimates, slots: int
) -> list[float]:
    """When each request will be finished, on the caller's clock.

    Between two departures the same requests share every call, so the list is looked at once for
    each departure and not for each evaluation. A request that goes on in a later pass takes part
    in it at once.
    """
    requests = list(requests)
    left = [request.evaluations_left for request in requests]
    finished = [now] * len(requests)
    ordered = sorted(range(len(requests)), key=lambda i: requests[i].sort_key(now))
    index = {id(requests[i]): i for i in ordered}
    rank = {i: position for position, i in enumerate(ordered)}
    running = [i for i in ordered if requests[i].started]
    waiting = [i for i in ordered if not requests[i].started]
    clock = now
    if waiting and not running:
        clock += estimates.prepare_seconds(requests[waiting[0]].batch_key)
    decoder = clock
    while running or waiting:
        free = slots - len(running)
        running = sorted([*running, *waiting[:free]], key=rank.__getitem__)
        waiting = waiting[free:]
        limit = estimates.row_limit(len(running), slots)
        batch = select_batch([requests[i] for i in running], limit)
        count = min(left[index[id(request)]] for request in batch)
        clock += count * estimates.evaluation_seconds(batch)
        for i in [index[id(request)] for request in batch]:
            left[i] -= count
            if left[i] > 0:
                continue
            if requests[i].later_pass:
                requests[i] = requests[i].start_later_pass()
                index[id(requests[i])], left[i] = i, requests[i].evaluations_left
            else:
                running.remove(i)  # the decoder decodes one image after another
                decoder = max(decoder, clock) + estimates.decode_seconds(batch[0].batch_key)
                finished[i] = decoder
    return finished


def estimate_lateness(
    requests: Sequence[ScheduledRequest], now: float, estimates: CostEstimates, slots: int
) -> list[float]:
    """Seconds by which each request may miss its deadline; negative if it meets it."""
    finished = estimate_finish_times(requests, now, estimates, slots)
    return [
        SAFETY_FACTOR * (at - now) - (request.deadline - now)
        for request, at in zip(requests, finished, strict=True)
    ]
