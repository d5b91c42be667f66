"""The parser of the command line: no abbreviations, and a near match for what is misspelled.

Knows argparse; not which commands there are.
"""

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from sdrt.errors import UsageError

# What users of other tools type, and its name here: the first that the command has.
ALIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("--cfg", "--cfg-scale", "--guidance", "--scale"), ("--guidance-scale",)),
    **dict.fromkeys(("--height", "--width", "--resolution", "-W", "-H"), ("--size",)),
    **dict.fromkeys(("--init-img", "--init-image", "--input"), ("--image",)),
    **dict.fromkeys(("--n-samples", "--batch-size", "--n-iter", "--count"), ("--num-images",)),
    **dict.fromkeys(("--num-inference-steps", "-s"), ("--steps",)),
    **dict.fromkeys(("--sampler", "--sampling-method"), ("--scheduler", "--schedulers")),
    **dict.fromkeys(("--out", "--outdir", "--output-dir", "-o"), ("--output",)),
    **dict.fromkeys(("--model", "-m"), ("--model", "--bundle")),
    "--api-key": ("--keys",),
    "-p": ("--port",),
    "--denoising-strength": ("--strength",),
    "--gpu": ("--device",),
    "--listen": ("--host",),
    "--mask-image": ("--mask",),
    "--negative": ("--negative-prompt",),
}
_PRECISION = "the precision is the bundle's: see `sdrt build --help`"
# What no option stands for, and what to do.
INSTEAD = {
    **dict.fromkeys(("--prompt", "-p"), 'pass the text itself: `sdrt run "a red circle"`'),
    **dict.fromkeys(("--fp16", "--half", "--precision"), _PRECISION),
}


OPTION = re.compile(r"--[^ ]+|-[A-Za-z][^ ]*")


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of exiting."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    @property
    def flags(self) -> dict[str, str]:
        """The option that is typed, by the name of its value."""
        return {a.dest: a.option_strings[-1] for a in self._actions if a.option_strings}

    def format_help(self) -> str:
        """With a usage of one line: the groups below it list the options."""
        if self.usage is None and not self._subparsers:
            formatter = self._get_formatter()
            names = [formatter._format_args(a, a.dest) for a in self._get_positional_actions()]
            self.usage = " ".join(["%(prog)s [OPTIONS]", *names])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument (\S+): ", r"\1 ", message)
        raise UsageError(text, hint=f"run `{self.prog} --help`")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self._check_options(args or ())
        return super().parse_known_args(args, namespace)

    def _check_options(self, args: Sequence[str]) -> None:
        """Raise UsageError for an unknown option, before another one is reported as missing."""
        positionals = self._get_positional_actions()
        if args and not positionals and args[0][:1] != "-":
            raise UsageError(f"unexpected argument `{args[0]}`", hint=self._option_for(args[0]))
        for arg in args:
            name = arg.partition("=")[0]
            if arg == "--" or (self._subparsers and arg[:1] != "-"):  # a command has its own
                return
            if OPTION.fullmatch(name) and not self._has_option(name):
                raise UsageError(f"unknown option `{name}`", hint=self._hint(name))

    def _has_option(self, name: str) -> bool:
        """Short ones may be typed together, or with their value."""
        short = name[:2] if name[1] != "-" else name
        return name in self._option_string_actions or short in self._option_string_actions

    def _hint(self, name: str) -> str:
        options = self._option_string_actions
        alias = next((option for option in ALIASES.get(name, ()) if option in options), None)
        if alias is None and name in INSTEAD:
            return INSTEAD[name]
        return self._suggest(alias or closest(name, options))

    def _option_for(self, value: str) -> str:
        """What to type for a value without its option."""
        named = [name for name in ("--model", "--bundle") if name in self._option_string_actions]
        return f"did you mean `{named[0]} {value}`?" if named else f"run `{self.prog} --help`"

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
        what = "/".join(action.option_strings) or str(action.metavar or action.dest).lower()
        message = f"unknown {what} `{value}`"
        near = closest(str(value), names)
        is_command = isinstance(action, argparse._SubParsersAction)
        expected = None if near or is_command else f"expected one of {', '.join(names)}"
        raise UsageError(message, hint=expected or self._suggest(near))

    def _suggest(self, near: str | None) -> str:
        return f"did you mean `{near}`?" if near else f"run `{self.prog} --help`"


def closest(name: str, names: Iterable[str]) -> str | None:
    """The name that is meant by a misspelled one, if any is near."""
    listed = list(names)
    begins = [other for other in listed if len(name) > 3 and other.startswith(name)]
    return next(iter([*begins, *difflib.get_close_matches(name, listed, n=1)]), None)


def name_flags(error: UsageError, flags: Mapping[str, str]) -> UsageError:
    """The error of an option in the words of the command line.

    Args:
        error: Its message may begin with an option's name in Python.
        flags: What is typed, by that name.
    """
    names = "|".join(map(re.escape, flags))
    message = re.sub(
        rf"^({names})(?= (?:is|has|holds|of|requires|with|\d))|\b(?=\w+_)({names})\b",
        lambda match: flags[match[0]],
        error.message,
    )
    return UsageError(message, hint=error.hint)
