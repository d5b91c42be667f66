"""Reading a component's `config.json`: what shapes the network, what is fixed, what is ignored.

A key that the network does not know is an error unless it holds the value that changes nothing:
a checkpoint is never half understood.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from sdrt.errors import CheckpointError

log = logging.getLogger("sdrt.build")
T = TypeVar("T")
# What training and saving leave behind; so are all names that begin with an underscore.
IGNORED = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup"}
IGNORED |= {"inv_gamma", "power", "collected_params"}  # of averaged weights
IGNORED |= {"architectures", "dropout", "dtype", "gradient_checkpointing", "torch_dtype"}


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
    unused = {key for key in raw if key.startswith("_") or key in IGNORED or key in ignored}
    unused -= known
    if unused:
        log.debug("%s: these settings change nothing: %s", kind.__name__, ", ".join(sorted(unused)))
    for key, value in raw.items():
        if key in known or key in unused:
            continue
        if key not in fixed:
            raise CheckpointError(
                f"{kind.__name__}: the configuration has {key}={value!r}, which is not known here; "
                "export only what is fully understood"
            )
        if value != fixed[key] and not (_is_off(fixed[key]) and _is_off(value)):
            raise CheckpointError(
                f"{kind.__name__}: {key}={value!r} is not supported; expected {fixed[key]!r}"
            )
    values = {key: _frozen(value) for key, value in raw.items() if key in known}
    return kind(**values)


def _is_off(value: Any) -> bool:
    """Whether it turns a setting off: false, null, or false for every stage."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_off, value))
    return value is None or value is False


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
