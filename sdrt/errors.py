"""Everything that sdrt raises on purpose.

    SdrtError                exit code 1
    ├── UsageError           2   an argument is out of range or does not fit the bundle
    ├── BundleError          3   a bundle is missing, damaged or from another version
    ├── CheckpointError      4   a model cannot be found, read or understood
    ├── BackendError         5   no backend serves, or one failed
    ├── ParityError          6   a component differs from torch by more than its floor
    ├── DeviceLostError      7   a GPU failed for good; only a new process can use it again
    └── StorageError         8   a disk is full or fails, or a folder cannot be written

A message says what was found and what was expected; a hint says what to do about it. An
interrupted command exits with 130.
"""


class SdrtError(Exception):
    """The root: catch this to catch all that sdrt raises on purpose.

    Args:
        message: What was found and what was expected, without a full stop at its end.
        hint: What to do about it, such as "run `sdrt doctor`"; the command line prints it on a
            line of its own.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UsageError(SdrtError):
    """An argument is out of range or does not fit the bundle."""

    exit_code = 2


class BundleError(SdrtError):
    """A bundle is missing, damaged or from another version."""

    exit_code = 3


class CheckpointError(SdrtError):
    """A model cannot be found, read or understood."""

    exit_code = 4


class BackendError(SdrtError):
    """No backend serves this machine, or one failed."""

    exit_code = 5


class ParityError(SdrtError):
    """A component differs from torch by more than its floor."""

    exit_code = 6


class DeviceLostError(SdrtError):
    """A GPU failed for good: no other backend or size helps, only a new process."""

    exit_code = 7


class StorageError(SdrtError):
    """A disk is full or fails, or a folder cannot be written."""

    exit_code = 8
