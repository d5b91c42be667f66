"""A folder that keeps between runs of the tests what is slow to build.

- An entry is a folder named by a hash of everything that its contents depend on.
- Processes share it. An entry is written and read under a lock and appears by a rename, so that a
  killed process leaves nothing that counts as an entry.
- `prune` removes what has not been used for long, then the longest unused entries above a size.

Knows folders and hashes of files; not what is in an entry.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_DAYS = 14.0
MAX_BYTES = 1_000_000_000


def cache_folder() -> Path:
    """`$SDRT_TEST_CACHE`, or a folder in `build`."""
    named = os.environ.get("SDRT_TEST_CACHE")
    return Path(named).expanduser().absolute() if named else REPOSITORY / "build" / "test-cache"


@contextmanager
def cached(folder: Path, key: str, write: Callable[[Path], object]) -> Iterator[Path]:
    """The folder of an entry, to read while its lock is held.

    Args:
        key: hexadecimal; names the entry.
        write: fills the folder it is given; called only where there is no such entry.
    """
    entry, partial = folder / key, folder / f"{key}.partial"
    with locked(folder, key):
        if not entry.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            partial.rename(entry)
        os.utime(entry)  # when it was last used
        yield entry


@contextmanager
def locked(folder: Path, key: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of an entry, which a few others share: locks are never removed.

    Raises:
        BlockingIOError: another process holds it, and `wait` is off.
    """
    path = folder / ".locks" / key[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def prune(folder: Path, max_days: float = MAX_DAYS, max_bytes: int = MAX_BYTES) -> list[str]:
    """Remove old, unfinished and surplus entries that nobody uses; returns their names."""
    removed, total, oldest = [], 0, time.time() - max_days * 86_400
    entries = [path for path in folder.glob("[!.]*") if path.is_dir()]
    for entry in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(BlockingIOError), locked(folder, entry.name, wait=False):
            total += sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
            unfinished = entry.suffix == ".partial"
            if unfinished or total > max_bytes or entry.stat().st_mtime < oldest:
                shutil.rmtree(entry)
                removed.append(entry.name)
    return removed


def hash_files(root: Path, files: Iterable[Path]) -> str:
    """Of the bytes of files and their paths below `root`."""
    hashed = hashlib.sha256()
    for file in sorted(files):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        hashed.update(f"{file.relative_to(root)} {digest}\n".encode())
    return hashed.hexdigest()
