"""What whoever asks for pictures in flight gets: tickets, and the errors that end one.

Knows nothing of how pictures are made.
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
from sdrt.runtime.job import GenerationJob
from sdrt.runtime.leases import Lease
from sdrt.runtime.lora.sets import LoraSet
from sdrt.runtime.requests import Request

from .scheduler import Turn

log = logging.getLogger(__name__)

Cause = Literal["queue", "deadline", "memory", "draining", "broken"]


class RequestRejected(SdrtError):
    """A request was not accepted. cause: why; retry_after: seconds until it may fit."""

    def __init__(self, cause: Cause, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.cause, self.retry_after = cause, max(1.0, retry_after)


class RequestCancelled(SdrtError):
    """Whoever asked for the picture does not want it any more, or the engine was closed."""


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A finished picture and the text that goes into its file."""

    image: Image
    parameters: str
    seed: int


@dataclass(slots=True)
class Times:
    """Seconds on the clock of `time.monotonic`; None for what has not come yet.

    began: given a slot. prepared: ready for its first evaluation. denoised: after its last
    """

    submitted: float
    began: float | None = None
    prepared: float | None = None
    denoised: float | None = None
    decoded: float | None = None


OnStep = Callable[["RequestHandle", Step], None]
State = Literal["waiting", "preparing", "running", "decoding", "done", "failed", "cancelled"]
Prepared = Iterator[tuple[Request, DenoisingState, LatentEdit | None]]


@dataclass(slots=True, eq=False)
class Submission:
    """What the pictures of one call of `submit` share."""

    job: GenerationJob
    on_step: OnStep | None
    loras: LoraSet | None = None  # which its images are made with; None: what is carried anyway
    prepared: Prepared | None = None
    weights: object = None  # by which it was prepared
    failed: Exception | None = None


@dataclass(slots=True, eq=False)
class RequestHandle:
    """One picture on its way. future: gives the `GeneratedImage`, or raises what went wrong."""

    request: Request
    evaluations: int
    times: Times
    turn: Turn
    submission: Submission = field(repr=False)
    on_cancel: Callable[["RequestHandle"], None] = field(repr=False)
    state: State = "waiting"
    future: "Future[GeneratedImage]" = field(default_factory=Future, repr=False)
    run: DenoisingState | None = field(default=None, repr=False)
    edit: LatentEdit | None = field(default=None, repr=False)
    unwanted: bool = False
    lease: Lease | None = None

    @property
    def done_evaluations(self) -> int:
        return self.evaluations - self.turn.left

    def held(self) -> AbstractContextManager[None]:
        """This thread works on the picture, for callbacks that must not wait for its end."""
        return self.lease.held() if self.lease else nullcontext()

    def let_go(self) -> None:
        """The picture needs the pipeline's weights no more."""
        if self.lease:
            self.lease.release()

    def cancel(self) -> None:
        """Give the slot back at the next evaluation; a finished picture stays."""
        self.on_cancel(self)


class Observer(Protocol):
    """Told what happens, from the engine's threads; must be quick."""

    def called(self, rows: int, seconds: float) -> None: ...

    def finished(self, ticket: RequestHandle) -> None: ...

    def refused(self, cause: Cause) -> None: ...


def typed(error: Exception) -> SdrtError:
    """An error of the tree, whatever went wrong."""
    if isinstance(error, SdrtError):
        return error
    log.error("a picture failed", exc_info=error)
    return BackendError(f"{type(error).__name__}: {error}")
