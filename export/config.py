"""Reading a component's `config.json`: what shapes the network, what is fixed, what is told apart.

A key that the network does not know is an error unless it holds the value that changes nothing:
a checkpoint is never half understood.
"""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from sdrt.errors import CheckpointError

T = TypeVar("T")
IGNORED = {"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"}


def read_config(
    kind: type[T],
    raw: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any],
    ignored: Collection[str] = (),
) -> T:
    """An instance of `kind` from JSON; lists become tuples.

    `fixed` holds the one supported value of each key that does not vary; `ignored` names keys that
    change nothing here. Raises CheckpointError for any other key, or another value of a fixed one.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for key, value in raw.items():
        if key in known or key in IGNORED or key in ignored:
            continue
        if key not in fixed:
            raise CheckpointError(
                f"{kind.__name__}: the configuration has {key}={value!r}, which is not known here; "
                "export only what is fully understood"
            )
        if value != fixed[key]:
            raise CheckpointError(
                f"{kind.__name__}: {key}={value!r} is not supported; expected {fixed[key]!r}"
            )
    values = {key: _frozen(value) for key, value in raw.items() if key in known}
    return kind(**values)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
