"""What a process takes of its machine, and what others take of the processor meanwhile.

Knows Linux's /proc; where there is none, memory is the peak alone and others are not known.
"""

import contextlib
import os
import resource
import sys
import time
from pathlib import Path

STATUS = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon", "mapped": "RssFile"}


def memory(process: int | None = None) -> dict[str, int]:
    """Bytes of a process, this one by default: resident, its peak, and of what is resident that
    which is its own (anonymous) and that which is mapped from files; `shared_out` is what is
    resident with everything that several processes map counted by its share (PSS).
    """
    folder = Path(f"/proc/{process or 'self'}")
    try:
        status = _kilobytes(folder / "status")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    found = {name: status[key] * 1024 for name, key in STATUS.items() if key in status}
    with contextlib.suppress(OSError, KeyError):  # not every kernel tells
        found["shared_out"] = _kilobytes(folder / "smaps_rollup")["Pss"] * 1024
    return found


def _kilobytes(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line[-1] == "kB"}


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
