"""How a server is set up, and the bounds that it keeps."""

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdrt.errors import UsageError

HASHED = "sha256:"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Settings:
    """
    keys: sha256 digests of the keys that may call; None lets everyone in
    hosts: names that the Host header may carry; None for any
    slots, waiting, deterministic: of every engine
    drain: seconds that running requests have once the server is told to end
    most_work: pictures × pixels × steps of one request
    most_body: bytes; body_seconds: for all of it; head_seconds: for a request's head
    stalled_seconds: how long a client may leave unread what it is sent
    """

    host: str = "127.0.0.1"
    port: int = 7860
    keys: tuple[bytes, ...] | None = None
    hosts: tuple[str, ...] | None = LOCAL_NAMES
    slots: int = 16
    waiting: int = 64
    deterministic: bool = False
    drain: float = 30.0
    log_prompts: bool = False
    most_work: int = 2**30
    most_body: int = 32 * 2**20
    body_seconds: float = 60.0
    head_seconds: float = 15.0
    stalled_seconds: float = 60.0


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def digest_from_key(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def keys_from_file(path: Path) -> tuple[bytes, ...]:
    """Digests of the keys in a file, one a line, plain or `sha256:` and 64 hexadecimal digits.

    Raises UsageError if it cannot be read or holds none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the keys in {path} cannot be read: {error}") from error
    keys = tuple(_digests(path, lines))
    if not keys:
        raise UsageError(f"{path} holds no key; write one a line, plain or {HASHED}HEX")
    return keys


def _digests(path: Path, lines: Iterable[str]) -> Iterable[bytes]:
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not key.startswith(HASHED):
            yield digest_from_key(key.encode())
            continue
        text = key.removeprefix(HASHED)
        if len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef"):
            raise UsageError(
                f"{path}, line {number}: {HASHED} wants 64 hexadecimal digits after it"
            )
        yield bytes.fromhex(text)
