"""What a caller of `InflightBatcher.submit` gets: request handles, and their errors.

Knows nothing of how images are generated.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL.Image import Image

from sdrt.errors import BackendError, SdrtError
from sdrt.runtime.denoising import DenoisingState, LatentEdit, Step
from sdrt.runtime.job import GenerationJob, HiresPass, RefinerPass
from sdrt.runtime.leases import Lease
from sdrt.runtime.lora.sets import LoraSet
from sdrt.runtime.requests import Request

from .scheduler import ScheduledPass, ScheduledRequest

log = logging.getLogger(__name__)

Cause = Literal["queue", "deadline", "memory", "draining", "broken"]


class RequestRejected(SdrtError):
    """A request was not accepted.

    Attributes:
        cause: Why: queue, deadline, memory, draining or broken.
        retry_after: Seconds after which it may be accepted.
    """

    def __init__(self, cause: Cause, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.cause, self.retry_after = cause, max(1.0, retry_after)


class RequestCancelled(SdrtError):
    """The caller cancelled the request, or the batcher was closed."""


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A finished image, its generation parameters as text, and its seed."""

    image: Image
    parameters: str
    seed: int


@dataclass(slots=True)
class RequestTimes:
    """When a request reached each stage, in seconds of `time.monotonic`; None if not yet.

    Attributes:
        submitted: Accepted into the waiting queue.
        started: Got a slot.
        prepared: Ready for its first evaluation.
        denoised: After its last evaluation.
        decoded: The image is finished.
    """

    submitted: float
    started: float | None = None
    prepared: float | None = None
    denoised: float | None = None
    decoded: float | None = None


OnStep = Callable[["RequestHandle", Step], None]
State = Literal[  # "upscaling" is between two passes
    "waiting",
    "preparing",
    "running",
    "upscaling",
    "decoding",
    "done",
    "failed",
    "cancelled",
]
Prepared = Iterator[tuple[Request, DenoisingState, LatentEdit | None]]


@dataclass(slots=True, eq=False)
class RequestGroup:
    """What the requests of one call of `submit` with the same LoRA files share."""

    job: GenerationJob
    on_step: OnStep | None
    loras: LoraSet | None = None  # in the weights; None: those that the pipeline has anyway
    prepared: Prepared | None = None
    weights: object = None  # those it was prepared with
    failed: Exception | None = None


def _running_future() -> "Future[GeneratedImage]":
    """A future that only the engine ends: cancelling a task that awaits it leaves it as it is."""
    future: Future[GeneratedImage] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True, eq=False)
class RequestHandle:
    """One image in flight. `future` gives the `GeneratedImage`, or raises the error."""

    request: Request
    num_evaluations: int
    times: RequestTimes
    scheduled: ScheduledRequest
    group: RequestGroup = field(repr=False)
    on_cancel: Callable[["RequestHandle"], None] = field(repr=False)
    state: State = "waiting"
    future: "Future[GeneratedImage]" = field(default_factory=_running_future, repr=False)
    run: DenoisingState | None = field(default=None, repr=False)
    edit: LatentEdit | None = field(default=None, repr=False)
    cancel_requested: bool = False
    lease: Lease | None = None

    @property
    def evaluations_done(self) -> int:
        return self.num_evaluations - self.scheduled.total_evaluations_left

    @property
    def job(self) -> GenerationJob:
        """Of the pass that it is in."""
        later = self.group.job.later_pass
        return later.job if later and not self.scheduled.later_pass else self.group.job

    @property
    def is_in_refiner(self) -> bool:
        """Whether it is in the part of the run that a refiner does."""
        return self.group.job.refiner is not None and not self.scheduled.later_pass

    def lease_context(self) -> AbstractContextManager[None]:
        """Hold the request's lease in this thread, so that callbacks do not wait for it."""
        return self.lease.held() if self.lease else nullcontext()

    def release(self) -> None:
        """Release the pipeline's weights."""
        if self.lease:
            self.lease.release()

    def cancel(self) -> None:
        """Free the slot before the next evaluation; a finished image is kept."""
        self.on_cancel(self)


def schedule_pass(
    later: HiresPass | RefinerPass, request: Request, weights: LoraSet | None
) -> ScheduledPass:
    """What the scheduler knows of a pass that comes later, with the base's weights. A refiner
    shares no calls with a base; its calls are taken to cost as much.
    """
    job, timeline = later.job, later.get_timeline(request)
    table, rows = job.get_table(timeline), job.get_num_rows(timeline)
    model = later.name if isinstance(later, RefinerPass) else weights
    return ScheduledPass((job.size, model), rows, table.evaluations, table.full_fraction)


class Observer(Protocol):
    """Called from the batcher's threads, for metrics; must return quickly."""

    def batch_evaluated(self, rows: int, seconds: float) -> None: ...

    def request_finished(self, handle: RequestHandle) -> None: ...

    def request_rejected(self, cause: Cause) -> None: ...


def as_sdrt_error(error: Exception) -> SdrtError:
    """The error as an `SdrtError`."""
    if isinstance(error, SdrtError):
        return error
    log.error("a request failed", exc_info=error)
    return BackendError(f"{type(error).__name__}: {error}")
