"""The parser of the command line: no abbreviations, and a near match for what is misspelled.

Knows argparse; not which commands there are.
"""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from sdrt.errors import UsageError

# What users of other tools type, and its name here.
ALIASES = {
    "--cfg": "--guidance-scale",
    "--cfg-scale": "--guidance-scale",
    "--denoising-strength": "--strength",
    "--guidance": "--guidance-scale",
    "--height": "--size",
    "--init-img": "--image",
    "--model": "--bundle",
    "--n-samples": "--num-images",
    "--num-inference-steps": "--steps",
    "--sampler": "--scheduler",
    "--width": "--size",
}


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of exiting."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    @property
    def flags(self) -> dict[str, str]:
        """The option that is typed, by the name of its value."""
        return {a.dest: a.option_strings[-1] for a in self._actions if a.option_strings}

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"run `{self.prog} --help`")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self._subparsers is None:  # that of one command
            self._check_options(args or ())
        return super().parse_known_args(args, namespace)

    def _check_options(self, args: Sequence[str]) -> None:
        """Raise UsageError for an unknown option, before another one is reported as missing."""
        options = self._option_string_actions
        for arg in args:
            name = arg.partition("=")[0]
            if arg == "--":
                return
            if name.startswith("--") and " " not in arg and name not in options:
                alias = ALIASES.get(name)
                near = alias if alias in options else closest(name, options)
                raise UsageError(f"unknown option `{name}`", hint=self._suggest(near))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except UsageError as error:
            name = "/".join(action.option_strings)
            raise UsageError(f"{name} {error.message}", hint=error.hint) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        what = "/".join(action.option_strings)
        message = f"unknown {what} `{value}`" if what else f"unknown command `{value}`"
        near = closest(str(value), names)
        expected = None if near or not what else f"expected one of {', '.join(names)}"
        raise UsageError(message, hint=expected or self._suggest(near))

    def _suggest(self, near: str | None) -> str:
        return f"did you mean `{near}`?" if near else f"run `{self.prog} --help`"


def closest(name: str, names: Iterable[str]) -> str | None:
    """The name that is meant by a misspelled one, if any is near."""
    listed = list(names)
    begins = [other for other in listed if len(name) > 3 and other.startswith(name)]
    return next(iter([*begins, *difflib.get_close_matches(name, listed, n=1)]), None)
