"""Logs every few seconds what a long operation is doing. Knows the log; not the operation."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
INTERVAL = 3.0  # seconds


@contextlib.contextmanager
def log_progress(what: Callable[[], str]) -> Iterator[None]:
    """Log what is being done and for how long, every few seconds until it is done.

    what: asked each time, by a thread of its own
    """
    done, began = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(INTERVAL):
            log.info("%s: %.0f s so far", what(), time.monotonic() - began)

    threading.Thread(target=report, name="sdrt-progress", daemon=True).start()
    try:
        yield
    finally:
        done.set()
