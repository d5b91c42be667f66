"""One-time initialisation of native libraries by a single thread.

Python bindings initialise C++ function-local statics on first use. The guard of such a static
knows nothing of the GIL: one thread can wait for the guard while it holds the GIL, and the thread
inside the guard for the GIL, a deadlock. So it is used once before, by one thread.
"""

import threading
from collections.abc import Callable


def call_once(initialise: Callable[[], None]) -> Callable[[], None]:
    """Wrap a function so that its first call runs it, and concurrent callers wait for that."""
    lock, done = threading.Lock(), threading.Event()

    def initialised() -> None:
        if not done.is_set():
            with lock:
                if not done.is_set():
                    initialise()
                    done.set()

    return initialised
