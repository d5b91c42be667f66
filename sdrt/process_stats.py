"""Process and system resource statistics: memory, processors, and how busy others keep them.

Knows psutil, and of Linux what psutil does not report: a process's peak and its anonymous and
file-mapped memory (/proc/PID/status), and the limits of control groups, which is how containers
restrict memory and processors. Elsewhere the peak is the only other figure, and memory is that of
the machine.
"""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

log = logging.getLogger(__name__)
STATUS = {"peak": "VmHWM", "anonymous": "RssAnon", "mapped": "RssFile"}
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def cpu_count() -> int:
    """Processors that this process may use: by its affinity, and by its container's CPU quota
    (rounded up); at least 1.
    """
    count = os.cpu_count() or 1
    if sys.platform != "darwin":  # which has no affinity
        with contextlib.suppress(psutil.Error, OSError):
            count = len(psutil.Process().cpu_affinity()) or count
    return max(1, min([count, *map(math.ceil, _cpu_quotas())]))


def memory(process: int | None = None) -> dict[str, int]:
    """Memory of a process, this one by default, in bytes; empty if the process is gone.

    Returns:
        `resident` and its `peak`; on Linux also the parts of it that are its own (`anonymous`) and
        mapped from files (`mapped`), and `shared_out`: resident memory with every page that
        several processes map divided among them (PSS).
    """
    values: dict[str, int] = {}
    with contextlib.suppress(psutil.Error, OSError):
        values["resident"] = int(psutil.Process(process).memory_info().rss)
        if sys.platform == "linux":
            values["shared_out"] = int(psutil.Process(process).memory_full_info().pss)
    return values | _details(process)


def resident_bytes(process: int | None = None) -> int:
    """What a process, this one by default, has in memory now; 0 if it is gone."""
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return 0


def peak_bytes(process: int | None = None) -> int:
    """The maximum since a process's start or its `forget_peak`; 0 if it is gone or unknown."""
    return _details(process).get("peak", 0)


def forget_peak(process: int | None = None) -> None:
    """Measure the peak from now on. Linux only; elsewhere it stays that since the start."""
    try:
        (_folder(process) / "clear_refs").write_text("5")
    except OSError:
        log.debug("the memory peak cannot be reset on this system")


def available_bytes() -> int:
    """Free memory of the machine, or of its container if that allows less."""
    free = int(psutil.virtual_memory().available)
    return min([free, *(top - used for top, used in _memory_limits())])


def total_bytes() -> int:
    """Memory of the machine."""
    return int(psutil.virtual_memory().total)


def _details(process: int | None) -> dict[str, int]:
    """The fields of `STATUS`, or the peak alone where there is no /proc; of a process that is
    gone, nothing.
    """
    try:
        lines = (_folder(process) / "status").read_text().splitlines()
    except OSError:
        peak = _peak_elsewhere(process)
        return {"peak": peak} if peak else {}
    kilobytes = {key: rest.split() for key, _, rest in (line.partition(":") for line in lines)}
    return {name: int(kilobytes[key][0]) * 1024 for name, key in STATUS.items() if key in kilobytes}


def _peak_elsewhere(process: int | None) -> int:
    if sys.platform == "win32":
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(process).memory_info().peak_wset)
    elif process is None:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0


def _folder(process: int | None) -> Path:
    return Path(f"/proc/{process or 'self'}")


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Bytes that control groups allow this process, and bytes used of them, without files that the
    kernel drops when it needs the memory.
    """
    for version, top, used, cached in (
        (2, "memory.max", "memory.current", "inactive_file"),
        (1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _group_folders(version, "memory"):
            with contextlib.suppress(OSError, ValueError):  # no such limit
                limit = int((folder / top).read_text())
                lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                dropped = next((int(value) for name, value in lines if name == cached), 0)
                yield limit, int((folder / used).read_text()) - dropped


def _cpu_quotas() -> Iterator[float]:
    """Processors' worth of time that control groups allow this process."""
    for folder in _group_folders(2, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            yield quota / period
    for folder in _group_folders(1, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:  # -1: no limit
                yield quota / int((folder / "cpu.cfs_period_us").read_text())


def _group_folders(version: int, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those around it, innermost first. Inside a
    container only the outermost is there, and it is the container's.
    """
    root = CGROUPS if version == 2 else CGROUPS / controller
    own = root
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(",") if version == 1 else not controllers:
                own = root / path.lstrip("/")
    yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


class Others:
    """From its creation on: the share of all processors used by other processes, and by other
    machines on the same hardware.
    """

    def __init__(self) -> None:
        self._began, self._own, self._busy = time.perf_counter(), time.process_time(), _busy()

    def busy_fraction(self) -> float:
        """Between 0 and 1. The kernel counts in hundredths of a second, so that less than a tenth
        of a second says nothing.
        """
        spent = _busy() - self._busy - (time.process_time() - self._own)
        elapsed = time.perf_counter() - self._began
        return min(1.0, max(0.0, spent / elapsed / (os.cpu_count() or 1)))


def _busy() -> float:
    """Seconds of all processors together that were not idle, since the machine's start."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")  # those that this system counts
    return float(sum(getattr(times, name, 0.0) for name in names))
