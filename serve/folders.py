"""Folders that one server has for itself."""

from contextlib import ExitStack
from pathlib import Path

from sdrt.atomic_files import locked
from sdrt.errors import UsageError


def claim_folder(folder: Path, lock: ExitStack, use: str, option: str) -> None:
    """Create a folder if it is missing, and lock it until `lock` is closed.

    Args:
        folder: The folder.
        lock: Takes the lock over.
        use: What it is for, as in "as gallery".
        option: That names another folder.

    Raises:
        UsageError: The folder cannot be used, or another server uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(folder, wait=False))
    except BlockingIOError:
        raise UsageError(
            f"another server uses {folder}", hint=f"choose another folder with {option}"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot use {folder} {use}: {error.strerror}") from error
