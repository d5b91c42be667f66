"""Processes that kill themselves at a chosen point of their work, to see what they leave behind.

A point is what changes the disk, reported by Python's audit events: a file opened to be written, a
name made, moved or taken away, a lock taken; and each fsync, which has no event. SIGKILL comes
before it, and the last comes after all.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
Work = Callable[[], object]


def points_of(work: Work) -> list[str]:
    """What work does to the disk, in order, as it is done in a child."""
    read, write = os.pipe()

    def reported() -> None:
        _watch(lambda name: os.write(write, f"{name}\n".encode()))
        work()

    died = in_child(reported)
    os.close(write)
    with os.fdopen(read) as lines:
        names = lines.read().split("\n")[:-1]
    if died:
        raise RuntimeError(f"the work failed: {died}")
    return [*names, "the end"]


def killed_at(point: int, work: Work) -> None:
    """Do the work in a child that kills itself before the given point."""
    done = 0

    def count(_: str) -> None:
        nonlocal done
        if done == point:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    def doomed() -> None:
        _watch(count)
        work()
        count("the end")

    if (died := in_child(doomed)) != -signal.SIGKILL:
        raise RuntimeError(f"not killed at {point} but ended with {died}")


def _watch(see: Callable[[str], object]) -> None:
    """For the rest of this process."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
        exchanges = event == "ctypes.dlsym" and args[1] == "renameat2"
        if writes or exchanges or event in CHANGES:
            see(args[1] if exchanges else event)

    fsync = os.fsync

    def seen_fsync(file: int) -> None:
        see("fsync")
        fsync(file)

    os.fsync = seen_fsync
    sys.addaudithook(hook)


def in_child(work: Work) -> int:
    """0, its exit status, or less the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)
