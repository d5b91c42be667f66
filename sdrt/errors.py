"""Everything that sdrt raises on purpose.

    SdrtError                exit code 1
    ├── UsageError           2   an argument is out of range or does not fit the bundle
    ├── BundleError          3   a bundle is missing, damaged or from another version
    ├── CheckpointError      4   a model cannot be found, read or understood
    ├── BackendError         5   no backend serves, or one failed
    └── ParityError          6   a component differs from torch by more than its floor

Each message says what was found, what was expected and what to type. An interrupted command
exits with 130.
"""


class SdrtError(Exception):
    """The root: catch this to catch all that sdrt raises on purpose."""

    exit_code = 1


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
