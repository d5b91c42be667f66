"""Folders that appear whole or not at all.

Knows files, not what is in them. A folder is made beside its place and renamed into it; two that
make the same one wait for each other, and what a killed one left is cleared by the next.
"""

import errno
import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BundleError, SdrtError

log = logging.getLogger(__name__)


@contextmanager
def published(target: Path, mark: str, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if nothing is raised.

    mark: the file by which such a folder is known; one without it is never replaced
    Raises BundleError where the place is taken, SdrtError where it cannot be written.
    """
    if target.exists() and not (target / mark).is_file():
        raise BundleError(f"{target} exists and has no {mark}; name another --output")
    with _told(target), _lock(target):
        if target.exists() and not force:
            raise BundleError(f"{target} is there already; --force builds it again")
        with _workshop(target) as folder:
            yield folder
            _publish(folder, target)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
def _lock(target: Path) -> Iterator[None]:
    """Two builds of one bundle wait for each other; the kernel drops a killed build's lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another build of %s is running; waiting for it", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A folder beside the target that is gone afterwards, and whatever killed builds left."""
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(_old(target), ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _publish(folder: Path, target: Path) -> None:
    if target.exists():
        target.rename(_old(target))
    folder.rename(target)
    shutil.rmtree(_old(target), ignore_errors=True)
