"""What a native library sets up when it is first used, set up by one thread.

Bindings keep such things in C++ function-local statics, whose guard knows nothing of Python's lock:
one thread waits for the guard with the lock in its hands, while the one inside the guard waits for
the lock, for ever. So whatever several threads may use first is used here before, alone.
"""

import threading
from collections.abc import Callable


def call_once(initialise: Callable[[], None]) -> Callable[[], None]:
    """The function, which runs when it is first called; other callers wait until it has."""
    lock, done = threading.Lock(), threading.Event()

    def initialised() -> None:
        if not done.is_set():
            with lock:
                if not done.is_set():
                    initialise()
                    done.set()

    return initialised
