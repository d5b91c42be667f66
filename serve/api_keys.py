"""API keys: the file that lists them, and what each may use.

Knows their digests only: no key is stored in plain text.
"""

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdrt.errors import UsageError

DIGEST_PREFIX = "sha256:"
KEY_NAME = re.compile(r"[\w.-]{1,64}")
MAX_LIMIT = 10**15
MAX_REQUESTS = 100_000  # a minute; their times are in memory


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What the requests of one key may use; None: unlimited.

    Attributes:
        requests_per_minute: Requests for images in any 60 seconds.
        images_in_flight: Images that are queued or being generated at one time.
        pixel_steps_per_day: Images × pixels × steps from midnight to midnight, UTC.
    """

    requests_per_minute: int | None = None
    images_in_flight: int | None = None
    pixel_steps_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. digest: its SHA-256; name: for metrics and messages"""

    digest: bytes
    name: str
    limits: KeyLimits = KeyLimits()


def hash_key(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read API keys, plain or as `sha256:` and 64 hexadecimal digits, from a file: one per line, or
    in a file that ends in `.toml` as tables with a name and limits.

    Raises:
        UsageError: The file cannot be read, is invalid or holds no key.
    """
    try:
        text = path.read_text("utf-8")
        keys = tuple(_parse_tables(path, text) if path.suffix == ".toml" else _parse(path, text))
    except OSError as error:
        raise UsageError(f"cannot read API keys from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read API keys from {path}: it is not UTF-8") from error
    if not keys:
        raise UsageError(
            f"{path} contains no API key",
            hint=f"write one key per line, plain or as {DIGEST_PREFIX}HEX",
        )
    return keys


def _parse(path: Path, text: str) -> Iterable[ApiKey]:
    """The keys of lines, which are named by their position."""
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    lines = ((number, key) for number, key in lines if key and not key.startswith("#"))
    for position, (number, key) in enumerate(lines, start=1):
        yield ApiKey(_read_digest(key, f"{path}, line {number}"), f"key-{position}")


def _parse_tables(path: Path, text: str) -> Iterable[ApiKey]:
    """The keys of the tables `[keys.NAME]`."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    named = tables.get("keys", {})
    if tables.keys() - {"keys"} or not isinstance(named, dict):
        raise UsageError(f"{path}: expected only tables [keys.NAME]")
    digests: dict[bytes, str] = {}
    for name, table in named.items():
        key = _parse_table(f"{path}, [keys.{name}]", name, table)
        if other := digests.get(key.digest):
            raise UsageError(f"{path}: {other} and {name} are the same key")
        digests[key.digest] = name
        yield key


def _parse_table(where: str, name: str, table: Any) -> ApiKey:
    if not KEY_NAME.fullmatch(name):
        raise UsageError(f"{where}: expected a name of letters, digits, `_`, `-` and `.`")
    if not isinstance(table, dict) or not isinstance(table.get("key"), str) or not table["key"]:
        raise UsageError(f'{where}: expected key = "…", plain or as {DIGEST_PREFIX}HEX')
    limits = _parse_limits(where, {key: table[key] for key in table.keys() - {"key"}})
    return ApiKey(_read_digest(table["key"], where), name, limits)


def _parse_limits(where: str, values: Mapping[str, Any]) -> KeyLimits:
    known = [field.name for field in fields(KeyLimits)]
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{where}: unknown {name}", hint=f"expected {', '.join(known)}")
        largest = MAX_REQUESTS if name == "requests_per_minute" else MAX_LIMIT
        if type(value) is not int or not 1 <= value <= largest:
            raise UsageError(f"{where}: {name} is {value!r}; expected 1 to {largest}")
    return KeyLimits(**values)


def _read_digest(key: str, where: str) -> bytes:
    if not key.startswith(DIGEST_PREFIX):
        return hash_key(key.encode())
    text = key.removeprefix(DIGEST_PREFIX)
    if len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef"):
        raise UsageError(f"{where}: expected 64 hexadecimal digits after {DIGEST_PREFIX}")
    return bytes.fromhex(text)
