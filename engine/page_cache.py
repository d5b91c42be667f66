"""Release memory that is no longer needed: pages of mapped files, and the C heap's free blocks.

Knows Linux's /proc and madvise, mallopt and malloc_trim; does nothing on other systems.
"""

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
MADV_DONTNEED = 4  # MADV_DONTNEED
M_ARENA_MAX = -8  # of malloc.h
DROP_SECONDS = 0.05  # in which half a gigabyte may be read


class MappedFileUsers:
    """Counts the current users of this process's mapped files. Pages must not be dropped while a
    file may be unmapped: the address could belong to other memory by then.
    """

    def __init__(self) -> None:
        self._count, self._to_drop = 0, set[Path]()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._drop()

    def drop_pages(self, path: Path) -> None:
        """Call `drop_pages` as soon as there is no user."""
        with self._lock:
            self._to_drop.add(path)
            if not self._count:
                self._drop()

    def _drop(self) -> None:
        while self._to_drop:
            drop_pages(self._to_drop.pop())

    @contextmanager
    def dropping_pages(self, path: Path) -> Iterator[None]:
        """Use a file whose pages are read once, such as to pack weights: drop those that were read,
        time and again while there is no other user, and when the last has left.
        """
        done = threading.Event()

        def drop_regularly() -> None:
            while not done.wait(DROP_SECONDS):
                with self._lock:
                    if self._count == 1:
                        drop_pages(path)

        with self:
            thread = threading.Thread(target=drop_regularly, name="sdrt_drop_pages", daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
                with self._lock:
                    self._to_drop.add(path)


def drop_pages(path: Path) -> None:
    """Drop this process's pages of a file that is mapped read-only. They stay in the page cache,
    which all processes share, and are mapped again on access.
    """
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for low, high in _read_only_mappings(path):
        if libc.madvise(low, high - low, MADV_DONTNEED):
            log.debug("pages of %s stay resident", path)


def limit_arenas(count: int) -> None:
    """Let threads that start from now on share so many heaps of the C library (M_ARENA_MAX).

    By default there are eight a core, and blocks that one thread frees do not serve another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, count)


def trim_heap() -> None:
    """Return the C heap's free memory to the system (malloc_trim)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _read_only_mappings(path: Path) -> Iterator[tuple[int, int]]:
    """Address ranges where the file is mapped read-only; dropping writable pages loses changes."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    full = str(path.resolve())
    for line in lines:
        fields = line.split(maxsplit=5)  # range, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[5] == full and "w" not in fields[1]:
            low, high = fields[0].split("-")
            yield int(low, 16), int(high, 16)
