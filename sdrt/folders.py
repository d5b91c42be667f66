"""Folders that appear whole or not at all.

Knows files, not what is in them. A folder is made beside its place and takes it in one step; two
that make the same one wait for each other, and what a killed one left is cleared by the next.
"""

import ctypes
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .atomic_files import beside, locked, sync, sync_tree
from .errors import BundleError, SdrtError

log = logging.getLogger(__name__)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_unfinished: set[Path] = set()
CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def published(target: Path, mark: str, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if nothing is raised.

    mark: the file by which such a folder is known; one without it is never replaced
    Raises BundleError where the place is taken, SdrtError where it cannot be written.
    """
    with _told(target):
        if target.exists() and not (target / mark).is_file():
            raise BundleError(f"{target} exists and has no {mark}; name another --output")
    with _told(target), locked(target):
        restore(target)
        if target.exists() and not force:
            raise BundleError(f"{target} is there already; --force builds it again")
        with _workshop(target) as folder:
            yield folder
            _publish(folder, target)


def made_once(target: Path, fill: Callable[[Path], None]) -> Path:
    """The folder, filled by the first who wants it while the others wait."""
    if target.exists():
        return target
    with _told(target), locked(target):
        restore(target)
        if not target.exists():
            with _workshop(target) as folder:
                fill(folder)
                _publish(folder, target)
    return target


def restore(target: Path) -> None:
    """Put back what a killed `published` had set aside, or clear it away; hold the lock."""
    old = beside(target, "old")
    if old.exists() and not target.exists():
        log.warning("%s was being replaced when that was cut off; it is put back", target)
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SdrtError(
                f"no space left for {target}; nothing was published. Free some, or name another "
                "--output or SDRT_HOME"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise SdrtError(
                f"cannot write {target}: {error.strerror}; name another --output or SDRT_HOME"
            ) from error
        raise


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A folder beside the target that is gone afterwards, as is what killed builds left."""
    folder = beside(target, "partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _unfinished.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unfinished.discard(folder)


def clear_unfinished() -> None:
    """Delete what other threads are filling, in a process that ends without them."""
    for folder in tuple(_unfinished):
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """All on the disk first: a name that outlives a loss of power must not lead to empty files."""
    sync_tree(folder)
    if not target.exists():
        folder.rename(target)
    elif not _exchanged(folder, target):
        target.rename(beside(target, "old"))
        folder.rename(target)
    sync(target.parent)
    shutil.rmtree(beside(target, "old"), ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where this system or its file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    if swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))
