"""Errors for the arguments of public functions: UsageError with a hint, where Python has TypeError.

Knows functions and names; not what an argument means.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

from .errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")


def explain_arguments(instead: Mapping[str, str]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator that refuses arguments which a function does not have.

    Args:
        instead: What to do instead, by the names that users of other libraries pass.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            signature = inspect.signature(function)
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise _describe(function.__name__, signature, kwargs, instead, error) from None
            return function(*args, **kwargs)

        return call

    return decorate


def _describe(
    function: str,
    signature: inspect.Signature,
    passed: Mapping[str, object],
    instead: Mapping[str, str],
    error: TypeError,
) -> UsageError:
    names = [*signature.parameters]
    unknown = next((name for name in passed if name not in names), None)
    if unknown is None:
        return UsageError(f"{function}: {error}", hint=f"see help(sdrt.{function})")
    near = difflib.get_close_matches(unknown, names, n=1)
    suggestion = f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"
    return UsageError(
        f"{function} has no argument {unknown!r}", hint=instead.get(unknown, suggestion)
    )
