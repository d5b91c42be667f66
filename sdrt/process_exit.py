"""Exits a process some of whose threads are inside native libraries.

Such a thread cannot be stopped, and Python aborts the whole process if one comes back while the
interpreter is being taken down. Knows threads and signals; not what the threads do.
"""

import atexit
import logging
import os
import signal
import sys
import threading

from .atomic_files import remove_unfinished

_workers: list[threading.Thread] = []


def start_workers(threads: list[threading.Thread]) -> None:
    """Start daemon threads that may be inside a library when the process exits."""
    if not _workers:
        atexit.register(_at_exit)
    _workers[:] = [*filter(threading.Thread.is_alive, _workers), *threads]
    for thread in threads:
        thread.start()


def exit_now(code: int) -> None:
    """Exit the process now if such a thread is still running, else return."""
    if _any_worker_alive():
        logging.disable()  # of what its threads come to now
        remove_unfinished()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _at_exit() -> None:
    """Of programs that are not ours: end as Python does if it is for Ctrl-C, else wait."""
    if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt) and _any_worker_alive():
        logging.disable()
        remove_unfinished()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    for thread in tuple(_workers):
        thread.join()


def _any_worker_alive() -> bool:
    return any(thread.is_alive() for thread in tuple(_workers))
