"""Calls of a pipeline, and the changes that wait for them.

Any number of calls run at the same time, each under a lease. A change (other LoRA files, the end)
waits until all leases are over, and calls that begin meanwhile wait for it, so that an image is
made from one set of weights. Knows threads; not what a call computes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from sdrt.errors import BackendError, UsageError

T = TypeVar("T")
CLOSED = "the pipeline is closed; load it again with sdrt.load"
LOOK_AGAIN = 1.0  # seconds after which a change looks for loops whose threads have ended


class Lease:
    """One call's.

    thread: that runs the call, or ran it last; None if none is waited for
    running: whether it runs now; else the call is a loop that is paused, or waits its turn
    """

    __slots__ = ("_leases", "running", "thread")

    def __init__(self, leases: "Leases") -> None:
        self._leases = leases
        self.thread: threading.Thread | None = None
        self.running = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """This thread runs a part of the call, which belongs to no thread afterwards."""
        before = self.thread, self.running
        self.thread, self.running = threading.current_thread(), True
        try:
            yield
        finally:
            self.thread, self.running = before

    def end(self) -> None:
        """The call is over; may be said again."""
        self._leases.end(self)


class Leases:
    """The leases of all pipelines over the same engines.

    changes: how many changes there have been
    """

    def __init__(self) -> None:
        self.changes = 0
        self.closed = False
        self._changing = False
        self._held: dict[Lease, None] = {}
        self._changed = threading.Condition()

    def begin(self) -> Lease:
        """A lease, after a change that is under way, unless this thread holds one already, for
        which the change waits. Raises BackendError once the pipeline is closed.
        """
        lease = Lease(self)
        with self._changed:
            if self._changing and not self._own():
                self._changed.wait_for(lambda: not self._changing)
            if self.closed:
                raise BackendError(CLOSED)
            self._held[lease] = None
        return lease

    @contextlib.contextmanager
    def call(self) -> Iterator[Lease]:
        """A call that this thread runs from its beginning to its end."""
        lease = self.begin()
        try:
            with lease.held():
                yield lease
        finally:
            lease.end()

    def end(self, lease: Lease) -> None:
        with self._changed:
            if lease in self._held:
                del self._held[lease]
                self._changed.notify_all()

    def holds(self, lease: Lease) -> bool:
        return lease in self._held

    @contextlib.contextmanager
    def change(self, name: str, *, closing: bool = False) -> Iterator[None]:
        """Nobody else calls or changes anything meanwhile.

        name: the method, for messages. closing: whether no call may follow
        Raises UsageError inside a call of this thread's, which it would wait for in vain,
        BackendError once the pipeline is closed.
        """
        with self._changed:
            if self._own():
                raise UsageError(
                    f"{name} was called inside a call of the same pipeline: in a callback, or "
                    "before a loop over steps() or pictures() was finished; finish or close that "
                    "first"
                )
            self._changed.wait_for(lambda: not self._changing)
            if self.closed and not closing:
                raise BackendError(CLOSED)
            self._changing = True
            try:
                while self._in_use():
                    self._changed.wait(LOOK_AGAIN)
            except BaseException:
                self._over()
                raise
        try:
            yield
        finally:
            self.closed = self.closed or closing
            self._over()

    def drop_paused(self) -> None:
        """Give up this thread's loops that are paused; they raise if they are gone on with."""
        for lease in self._own():
            if not lease.running:
                self.end(lease)

    def _over(self) -> None:
        with self._changed:
            self.changes += 1
            self._changing = False
            self._changed.notify_all()

    def _own(self) -> list[Lease]:
        current = threading.current_thread()
        return [lease for lease in tuple(self._held) if lease.thread is current]

    def _in_use(self) -> bool:
        """Whether a lease is held; that of a loop whose thread has ended is given up."""
        for lease in tuple(self._held):
            if lease.thread is not None and not lease.running and not lease.thread.is_alive():
                self.end(lease)
        return bool(self._held)


class Loop(Iterator[T]):
    """What a generator yields, under a lease that ends with it, when it is closed or dropped."""

    def __init__(self, leases: Leases, make: Callable[[], Iterator[T]]) -> None:
        """make: gives the generator; runs under the lease."""
        self._made: Iterator[T] | None = None
        self._lease = leases.begin()
        self._leases = leases
        try:
            with self._lease.held():
                self._made = make()
        except BaseException:
            self._lease.end()
            raise
        self._lease.thread = threading.current_thread()

    def __next__(self) -> T:
        lease = self._lease
        if self._made is None:
            raise StopIteration
        if lease.running:
            raise UsageError("this loop is advanced by another thread; take a loop for each thread")
        if not self._leases.holds(lease):
            self.close()
            if self._leases.closed:
                raise BackendError("the pipeline was closed while this loop was paused")
            raise UsageError("the pipeline was changed while this loop was paused; begin it again")
        lease.thread, lease.running = threading.current_thread(), True
        try:
            return next(self._made)
        except BaseException:
            self.close()
            raise
        finally:
            lease.running = False

    def close(self) -> None:
        """End it where it is."""
        made, self._made = self._made, None
        close = getattr(made, "close", None)
        try:
            if close is not None:
                close()
        finally:
            self._lease.end()

    def __del__(self) -> None:
        if hasattr(self, "_lease"):
            self.close()
