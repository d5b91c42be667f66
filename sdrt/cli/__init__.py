"""The command line: a file a subcommand, what each takes in `arguments`, all together in `main`."""

from .main import entry

__all__ = ["entry"]
