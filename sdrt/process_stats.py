"""What a process takes of its machine, what is left of it, and what others take of the processor.

Knows Linux's /proc; where there is none, memory is the peak alone, without bound, and others are
not known.
"""

import contextlib
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)
STATUS = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon", "mapped": "RssFile"}
NO_BOUND = 2**62
CGROUPS = Path("/sys/fs/cgroup")


def memory(process: int | None = None) -> dict[str, int]:
    """Bytes of a process, this one by default: resident, its peak, and of what is resident that
    which is its own (anonymous) and that which is mapped from files; `shared_out` is what is
    resident with everything that several processes map counted by its share (PSS).
    """
    found = _held(process)
    with contextlib.suppress(OSError, KeyError):  # not every kernel tells
        found["shared_out"] = _bytes(_folder(process) / "smaps_rollup")["Pss"]
    return found


def resident_bytes(process: int | None = None) -> int:
    """What a process, this one by default, holds now; 0 where that is not known."""
    return _held(process).get("resident", 0)


def peak_bytes(process: int | None = None) -> int:
    """The most that a process held since its start or `forget_peak`; 0 where it is gone."""
    return _held(process).get("peak", 0)


def forget_peak(process: int | None = None) -> None:
    """Begin to measure the peak anew. Linux only; elsewhere it stays that since the start."""
    try:
        (_folder(process) / "clear_refs").write_text("5")
    except OSError:
        log.debug("the peak of memory cannot be reset here")


def available_bytes() -> int:
    """Free memory of the machine, or of its container; without bound where it cannot be read."""
    free = NO_BOUND
    with contextlib.suppress(OSError, KeyError):
        free = _bytes(Path("/proc/meminfo"))["MemAvailable"]
    return min([free, *(most - used for most, used in _bounds())])


def _bounds() -> Iterator[tuple[int, int]]:
    """Bytes that control groups allow this process, and bytes used of them, without files that the
    kernel drops when it needs their room: groups of version 2, then of version 1.
    """
    for folder, most, used, cached in (
        (CGROUPS, "memory.max", "memory.current", "inactive_file"),
        (
            CGROUPS / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such bound
            bound = int((folder / most).read_text())
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            dropped = next((int(value) for name, value in lines if name == cached), 0)
            yield bound, int((folder / used).read_text()) - dropped


def _held(process: int | None) -> dict[str, int]:
    """What `STATUS` names; of a process that is gone, nothing."""
    try:
        status = _bytes(_folder(process) / "status")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"peak": peak} if process is None else {}
    return {name: status[key] for name, key in STATUS.items() if key in status}


def _folder(process: int | None) -> Path:
    return Path(f"/proc/{process or 'self'}")


def _bytes(path: Path) -> dict[str, int]:
    """Lines such as `VmRSS:   1024 kB`, by name."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


class Others:
    """From its making on: the share of all processors that other processes took, and other
    machines on the same processors.
    """

    def __init__(self) -> None:
        self._began, self._own, self._busy = time.perf_counter(), time.process_time(), _busy()

    def share(self) -> float | None:
        """Between 0 and 1; None where it is not known. The kernel counts in hundredths of a
        second, so a tenth of a second is the least that says anything.
        """
        busy = _busy()
        if busy is None or self._busy is None:
            return None
        spent = busy - self._busy - (time.process_time() - self._own)
        return min(1.0, max(0.0, spent / (time.perf_counter() - self._began) / _processors()))


def _processors() -> int:
    return os.cpu_count() or 1


def _busy() -> float | None:
    """Seconds of all processors together that were not idle, since the machine's start."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, soft, stolen = map(int, line.split()[1:9])
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")
