"""Files that appear whole or not at all, and whose bytes are on the disk before they have a name.

Knows names, locks and the disk; not what is in a file. What belongs to X while it is made lies
beside it: `.X.lock` is held by who makes it, `.X.partial` is what there is of it, `.X.old` is what
stood there before. The kernel drops a killed process's lock: what nobody holds is left over.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)
PATIENCE, PAUSE = 0.5, 0.005  # seconds that a wait is not worth a word, and between tries


def beside(target: Path, what: str) -> Path:
    """Where the `lock`, `partial` or `old` of a name lies."""
    return target.with_name(f".{target.name}.{what}")


@contextlib.contextmanager
def locked(target: Path, wait: bool = True) -> Iterator[None]:
    """Hold a name: those that make one thing wait for each other, or get BlockingIOError."""
    path = beside(target, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            _hold(file, target, wait)
            if not _is_at(file, path):  # who held it before has taken it away
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _hold(file: IO[str], target: Path, wait: bool) -> None:
    """Takes the lock; who waits for long is told for what."""
    told = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            if time.monotonic() > told:
                break
        time.sleep(PAUSE)
    log.info("another process makes %s; waiting for it", target)
    fcntl.flock(file, fcntl.LOCK_EX)


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to, whose file becomes `path` if nothing is raised; raises OSError."""
    with locked(path):
        partial = beside(path, "partial")  # a killed one's is written over
        try:
            yield partial
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; raises OSError."""
    with whole(path) as partial:
        partial.write_bytes(content)


def write_new(path: Path, content: bytes) -> Path:
    """Write a file that appears whole or not at all, under a name that no file has yet: a number
    is added to one that is taken. Returns its path; raises OSError.
    """
    with locked(path):
        partial = beside(path, "partial")
        try:
            partial.write_bytes(content)
            sync(partial)
            for target in _numbered(path):
                with contextlib.suppress(FileExistsError):
                    _give_name(partial, target)
                    sync(target.parent)
                    return target
        finally:
            partial.unlink(missing_ok=True)
    raise AssertionError("numbers do not end")


def _numbered(path: Path) -> Iterator[Path]:
    """`a.png`, `a-2.png`, `a-3.png`, and so on."""
    yield path
    yield from (path.with_stem(f"{path.stem}-{count}") for count in itertools.count(2))


def _give_name(partial: Path, target: Path) -> None:
    """Give a file its name unless that is taken, which raises FileExistsError."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        partial.replace(target)


def sync(path: Path) -> None:
    """Have the disk keep a file's bytes, or a folder's names, through a loss of power."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """The same for all that is in a folder, and itself."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


def identity(stat: os.stat_result) -> str:
    """What changes when a file's bytes do, by whatever clock: an edit may put the size and the
    mtime back, but not the ctime.
    """
    parts = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino)
    return ":".join(map(str, parts))
