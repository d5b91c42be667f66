"""Memory that nothing needs any more, given back to the system.

Knows Linux's /proc and madvise and the C library's heap; anywhere else it does nothing.
"""

import ctypes
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)
MADV_DONTNEED = 4  # MADV_DONTNEED


class MappedFileUsers:
    """Who uses mapped files of this process now. What is dropped must not be unmapped meanwhile:
    whatever the system puts in its place would lose its bytes.
    """

    def __init__(self) -> None:
        self._count, self._lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1

    def drop_pages(self, path: Path) -> bool:
        """As `drop_pages`, if nobody uses any now; whether it was done."""
        with self._lock:
            if not self._count:
                drop_pages(path)
            return not self._count


def drop_pages(path: Path) -> None:
    """Drop this process's pages of a file that is mapped to be read. Their bytes stay in the
    system's cache, which all processes share, and are found again when they are touched.
    """
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for low, high in _read_only_mappings(path):
        if libc.madvise(low, high - low, MADV_DONTNEED):
            log.debug("pages of %s stay resident", path)


def trim_heap() -> None:
    """Have the C library's heap give back what was freed in it."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def _read_only_mappings(path: Path) -> Iterator[tuple[int, int]]:
    """Where the file is mapped; never where it may be written, which would lose what was."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    whole = str(path.resolve())
    for line in lines:
        fields = line.split(maxsplit=5)  # range, rights, offset, device, inode, path
        if len(fields) == 6 and fields[5] == whole and "w" not in fields[1]:
            low, high = fields[0].split("-")
            yield int(low, 16), int(high, 16)
