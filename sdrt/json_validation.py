"""Strict JSON from untrusted files: bounded, without duplicate names, every value checked.

Knows JSON; not what a file is for. A reader takes a value and where it stands, and gives it back
checked, or raises ValueError with both. Readers are made of readers.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import BundleError, SdrtError

T = TypeVar("T")
Reader = Callable[[Any, str], T]
MAX_NUMBER, MAX_LAYERS, MAX_LENGTH = 1_000_000, 256, 10_000  # of configurations
MAX_CONFIG = 1_000_000  # bytes
MAX_JSON = 16_000_000  # bytes; a vocabulary of 49,408 tokens has one million


def read_json(
    path: Path, error_class: type[SdrtError] = BundleError, max_bytes: int = MAX_JSON
) -> dict[str, Any]:
    """A JSON object from a file of at most so many bytes; raises the error with the file's name."""
    try:
        return json_object(read_bytes(path, max_bytes))
    except (OSError, ValueError) as error:
        raise error_class(f"{path} cannot be read as JSON: {error}") from error


def read_config(path: Path, error_class: type[SdrtError] = BundleError) -> dict[str, Any]:
    """A configuration, its values bounded; raises the error with the file's name."""
    raw = read_json(path, error_class, MAX_CONFIG)
    try:
        check_bounds(raw, "it")
    except ValueError as error:
        raise error_class(f"{path} is not a configuration: {error}") from error
    return raw


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A file; raises ValueError if it is larger or none, such as a pipe that never ends."""
    if not path.is_file() and path.exists():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    return data


def json_object(data: bytes) -> dict[str, Any]:
    """RFC 8259 in UTF-8, infinities besides; raises ValueError for all else."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, expected an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:60]!r} comes twice")
    return value


def _constant(name: str) -> float:
    """Published sampler configurations hold -Infinity."""
    if name == "NaN":
        raise ValueError("NaN is not a number")
    return float(name)


def _mismatch(value: Any, where: str, expected: str) -> ValueError:
    return ValueError(f"{where} is {shorten(value)}; expected {expected}")


def shorten(value: Any) -> str:
    """An untrusted value for a message: one line, at most 60 characters."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, endless nesting
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + ".."


def check_bounds(value: Any, where: str) -> None:
    """Raise ValueError for what no published configuration holds: numbers over a million, more
    layers than 256, endless lists, text and nesting.
    """
    if where.count(".") > 6:
        raise ValueError(f"{shorten(where)} is nested too deeply")
    limit = MAX_LAYERS if "layers" in where else MAX_NUMBER
    named = value if isinstance(value, dict) else {}
    inside = dict(enumerate(value)) if isinstance(value, list) else named
    if isinstance(value, int) and abs(value) > limit:
        raise _mismatch(value, where, f"a number up to {limit:,}")
    if isinstance(value, str | list | dict) and len(value) > MAX_LENGTH:
        raise ValueError(f"{shorten(where)} is {len(value):,} long; at most {MAX_LENGTH:,}")
    for name, item in inside.items():
        check_bounds(item, f"{where}.{name}")


def integer(low: int, high: int) -> Reader[int]:
    def read(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _mismatch(value, where, f"an integer from {low} to {high}")
        return value

    return read


def number(low: float = -math.inf, high: float = math.inf) -> Reader[float]:
    def read(value: Any, where: str) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise _mismatch(value, where, f"a number from {low:g} to {high:g}")
        return float(value)

    return read


def boolean(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise _mismatch(value, where, "true or false")
    return value


def text(pattern: str, expected: str) -> Reader[str]:
    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise _mismatch(value, where, expected)
        return value

    return read


def one_of(names: Collection[str]) -> Reader[str]:
    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in names:
            raise _mismatch(value, where, f"one of {', '.join(names)}")
        return value

    return read


def array(reader: Reader[T], min_length: int, max_length: int) -> Reader[tuple[T, ...]]:
    def read(value: Any, where: str) -> tuple[T, ...]:
        if not isinstance(value, list) or not min_length <= len(value) <= max_length:
            raise _mismatch(value, where, f"a list of {min_length} to {max_length}")
        return tuple(reader(item, f"{where}[{i}]") for i, item in enumerate(value))

    return read


def mapping(reader: Reader[T], names: Reader[str], max_length: int) -> Reader[dict[str, T]]:
    def read(value: Any, where: str) -> dict[str, T]:
        if not isinstance(value, dict) or len(value) > max_length:
            raise _mismatch(value, where, f"an object of at most {max_length}")
        return {names(n, f"a name in {where}"): reader(v, f"{where}.{n}") for n, v in value.items()}

    return read


def record(kind: type[T], readers: Mapping[str, Reader[Any]]) -> Reader[T]:
    """A dataclass, field by field; unknown and missing ones are refused by name."""
    needed = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    optional = {
        f.name
        for f in fields(kind)  # type: ignore[arg-type]
        if f.default is not MISSING or f.default_factory is not MISSING
    }
    assert needed == set(readers), kind

    def read(value: Any, where: str) -> T:
        if not isinstance(value, dict):
            raise _mismatch(value, where, "an object")
        if unknown := sorted(set(value) - needed):
            names = ", ".join(shorten(name) for name in unknown[:5])
            raise ValueError(f"{where} has unknown fields in {kind.__name__}: {names}")
        if missing := sorted(needed - optional - set(value)):
            raise ValueError(f"{where} lacks {', '.join(missing)} of {kind.__name__}")
        return kind(**{n: readers[n](v, f"{where}.{n}") for n, v in value.items()})

    return read
