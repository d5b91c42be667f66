"""Calls of a pipeline, and the changes that wait for them.

Any number of calls run at the same time, each with a lease. A change (other LoRA files, closing)
waits until all leases are released; calls that begin meanwhile wait for it. So each image is
generated with one set of weights. Knows threads; not what a call computes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from sdrt.errors import BackendError, UsageError

T = TypeVar("T")
CLOSED = "the pipeline is closed"
CLOSED_HINT = "load it again with sdrt.load"
POLL_SECONDS = 1.0  # seconds after which a change looks for loops whose threads have ended


class Lease:
    """One call's lease.

    Attributes:
        thread: That runs the call or ran it last; None where no thread need end first.
        running: Whether it runs now; else the call is a loop that is paused, or waits.
    """

    __slots__ = ("_leases", "running", "thread")

    def __init__(self, leases: "Leases") -> None:
        self._leases = leases
        self.thread: threading.Thread | None = None
        self.running = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Run a part of the call in this thread; afterwards the call belongs to no thread."""
        before = self.thread, self.running
        self.thread, self.running = threading.current_thread(), True
        try:
            yield
        finally:
            self.thread, self.running = before

    def release(self) -> None:
        """The call is over; may be called again."""
        self._leases.release(self)


class Leases:
    """The leases of all pipelines over the same engines.

    Attributes:
        changes: How many changes there have been.
        closed: Whether calls are refused.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.closed = False
        self._changing = False
        self._held: dict[Lease, None] = {}
        self._changed = threading.Condition()

    def acquire(self) -> Lease:
        """A lease, once no change is under way; at once in a thread that has a lease already, since
        the change waits for that one.

        Raises:
            BackendError: Once the pipeline is closed.
        """
        lease = Lease(self)
        with self._changed:
            if self._changing and not self._own_leases():
                self._changed.wait_for(lambda: not self._changing)
            if self.closed:
                raise BackendError(CLOSED, hint=CLOSED_HINT)
            self._held[lease] = None
        return lease

    @contextlib.contextmanager
    def call(self) -> Iterator[Lease]:
        """A call that this thread runs from beginning to end."""
        lease = self.acquire()
        try:
            with lease.held():
                yield lease
        finally:
            lease.release()

    def release(self, lease: Lease) -> None:
        with self._changed:
            if lease in self._held:
                del self._held[lease]
                self._changed.notify_all()

    def holds(self, lease: Lease) -> bool:
        return lease in self._held

    @contextlib.contextmanager
    def change(self, name: str, *, closing: bool = False) -> Iterator[None]:
        """Run exclusively: no call and no other change runs meanwhile.

        Args:
            name: Of the method, for messages.
            closing: Whether no call may follow.

        Raises:
            UsageError: Inside a call of this thread, which it would wait for in vain.
            BackendError: Once the pipeline is closed.
        """
        with self._changed:
            if self._own_leases():
                raise UsageError(
                    f"{name} was called inside a call of the same pipeline: in a callback, or in a "
                    "loop over steps() or stream()",
                    hint="finish or close the loop first",
                )
            self._changed.wait_for(lambda: not self._changing)
            if self.closed and not closing:
                raise BackendError(CLOSED, hint=CLOSED_HINT)
            self._changing = True
            try:
                while self._in_use():
                    self._changed.wait(POLL_SECONDS)
            except BaseException:
                self._finish_change()
                raise
        try:
            yield
        finally:
            self.closed = self.closed or closing
            self._finish_change()

    def drop_paused(self) -> None:
        """Release this thread's paused loops; they raise when they are continued."""
        for lease in self._own_leases():
            if not lease.running:
                self.release(lease)

    def _finish_change(self) -> None:
        with self._changed:
            self.changes += 1
            self._changing = False
            self._changed.notify_all()

    def _own_leases(self) -> list[Lease]:
        current = threading.current_thread()
        return [lease for lease in tuple(self._held) if lease.thread is current]

    def _in_use(self) -> bool:
        """Whether a lease is held; that of a loop whose thread has ended is released."""
        for lease in tuple(self._held):
            if lease.thread is not None and not lease.running and not lease.thread.is_alive():
                self.release(lease)
        return bool(self._held)


class LeasedIterator(Iterator[T]):
    """A generator with a lease, which is released when it is exhausted, closed or deleted."""

    def __init__(self, leases: Leases, create: Callable[[], Iterator[T]]) -> None:
        """create: returns the generator; called with the lease"""
        self._generator: Iterator[T] | None = None
        self._lease = leases.acquire()
        self._leases = leases
        try:
            with self._lease.held():
                self._generator = create()
        except BaseException:
            self._lease.release()
            raise
        self._lease.thread = threading.current_thread()

    def __next__(self) -> T:
        lease = self._lease
        if self._generator is None:
            raise StopIteration
        if lease.running:
            raise UsageError(
                "this loop is advanced by another thread", hint="use one loop in each thread"
            )
        if not self._leases.holds(lease):
            self.close()
            if self._leases.closed:
                raise BackendError("the pipeline was closed while this loop was paused")
            raise UsageError(
                "the pipeline was changed while this loop was paused", hint="start the loop again"
            )
        lease.thread, lease.running = threading.current_thread(), True
        try:
            return next(self._generator)
        except BaseException:
            self.close()
            raise
        finally:
            lease.running = False

    def close(self) -> None:
        """Stop the loop and release its lease."""
        generator, self._generator = self._generator, None
        close = getattr(generator, "close", None)
        try:
            if close is not None:
                close()
        finally:
            self._lease.release()

    def __del__(self) -> None:
        if hasattr(self, "_lease"):
            self.close()
