"""Files and folders that are published atomically: complete and on the disk, or not at all.

Knows names, locks and the disk; not what is in a file. While X is written, next to it are

- `.X.lock`, locked by the process that writes it; the kernel releases the lock of a killed one
- `.X.partial`, what is written so far
- `.X.old`, what X was before

A folder is replaced in one step. Processes that write the same name wait for each other, and clear
what a killed one left.
"""

import contextlib
import ctypes
import errno
import itertools
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import BundleError, StorageError

log = logging.getLogger(__name__)
QUIET_WAIT, POLL_INTERVAL = 0.5, 0.005  # seconds that a wait is not worth a word, and between tries
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_unfinished: set[Path] = set()
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def sibling(target: Path, what: str) -> Path:
    """The path of a name's `lock`, `partial` or `old`."""
    return target.with_name(f".{target.name}.{what}")


@contextlib.contextmanager
def locked(target: Path, wait: bool = True) -> Iterator[None]:
    """Lock a name. Waits for another process or thread that holds it; without `wait` raises
    BlockingIOError.
    """
    path = sibling(target, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            _acquire(file, target, wait)
            if not _is_current(file, path):  # its last holder has deleted it
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _acquire(file: IO[str], target: Path, wait: bool) -> None:
    """Take the lock; a long wait is logged."""
    from filelock import lock_descriptor  # 20 ms, paid by those who lock only

    deadline = time.monotonic() + QUIET_WAIT
    while not lock_descriptor(file.fileno(), blocking=False):
        if not wait:
            raise BlockingIOError(errno.EAGAIN, "another process holds the lock", str(target))
        if time.monotonic() > deadline:
            log.info("Waiting for another process that is building %s", target)
            lock_descriptor(file.fileno())
            return
        time.sleep(POLL_INTERVAL)


def is_locked(target: Path) -> bool:
    """Whether another process or thread holds a name at this moment."""
    try:
        with sibling(target, "lock").open() as file:
            _acquire(file, target, wait=False)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _is_current(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name to write to, whose file becomes `path` if nothing is raised; raises OSError."""
    with locked(path):
        partial = sibling(path, "partial")  # replaces that of a killed process
        try:
            yield partial
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically; raises OSError."""
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_numbered(path: Path, content: bytes) -> Path:
    """Write a file atomically, under a name that no file has yet: a number is added to a name
    that is taken. Returns its path; raises OSError.
    """
    with locked(path):
        partial = sibling(path, "partial")
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
    """Flush a file's bytes or a folder's names to the disk. Windows cannot flush folders."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    file = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """Flush everything in a folder, and the folder itself."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


def file_identity(stat: os.stat_result) -> str:
    """Changes whenever a file's bytes do: an edit can restore the size and the mtime, but not
    the ctime.
    """
    parts = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino)
    return ":".join(map(str, parts))


@contextmanager
def publish_folder(
    target: Path, marker: str, force: bool, *, resume: bool = False
) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if nothing is raised.

    marker: the file by which such a folder is known; one without it is never replaced
    resume: whether the folder has what a killed process left in it
    Raises BundleError where the place is taken, SdrtError where it cannot be written.
    """
    with _translate_errors(target):
        if target.exists() and not (target / marker).is_file():
            raise BundleError(
                f"{target} exists and has no {marker}", hint="choose another --output"
            )
    with _translate_errors(target), locked(target):
        restore_backup(target)
        if target.exists() and not force:
            raise BundleError(
                f"{target} exists", hint="replace it with --force, or choose another --name"
            )
        with _temporary_folder(target, resume) as folder:
            yield folder
            _publish(folder, target)


def build_once(target: Path, fill: Callable[[Path], None]) -> Path:
    """The folder; the first caller fills it while others wait."""
    if target.exists():
        return target
    with _translate_errors(target), locked(target):
        restore_backup(target)
        if not target.exists():
            with _temporary_folder(target) as folder:
                fill(folder)
                _publish(folder, target)
    return target


def restore_backup(target: Path) -> None:
    """Finish or undo a replacement that was killed; hold the lock."""
    old = sibling(target, "old")
    if old.exists() and not target.exists():
        log.warning("Restored %s after an interrupted update", target)
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _translate_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StorageError(
                f"no space left to write {target}; nothing was changed",
                hint="free some space, or set --output or SDRT_HOME to another disk",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
            raise StorageError(
                f"cannot write {target}: {error.strerror}",
                hint="set --output or SDRT_HOME to another folder",
            ) from error
        raise


@contextmanager
def _temporary_folder(target: Path, resume: bool = False) -> Iterator[Path]:
    """A folder next to the target, deleted at the end; replaces that of a killed build unless it
    is resumed.
    """
    folder = sibling(target, "partial")
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=resume)
    _unfinished.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unfinished.discard(folder)


def remove_unfinished() -> None:
    """Delete the folders that other threads are filling, before the process exits."""
    for folder in tuple(_unfinished):
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """Flush everything first: after a power loss, the name must not lead to empty files."""
    sync_tree(folder)
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        target.rename(sibling(target, "old"))
        folder.rename(target)
    sync(target.parent)
    shutil.rmtree(sibling(target, "old"), ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where this system or its file system cannot."""
    if sys.platform == "win32":
        return False
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    if swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))
