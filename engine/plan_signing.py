"""Native code is loaded only where it was made: what is written here carries a mark that nobody
else can make.

Knows a key of 32 random bytes in sdrt's home, which only its user may read; not what is marked. A
plan that comes with a bundle from elsewhere has a sidecar of the same stranger, so its sha256 says
nothing. Plans that were built for this machine on another are used where the operator names them:
`SDRT_TRUST_PLANS`, their sha256s with commas between.
"""

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from sdrt.atomic_files import write_atomic
from sdrt.bundle.store import home
from sdrt.errors import UsageError
from sdrt.json_validation import read_bytes

VARIABLE = "SDRT_TRUST_PLANS"
KEY_BYTES = MARK_BYTES = 32
MAX_MARKED = 2**30


def mark_of(content: bytes) -> str:
    """This user's mark on some bytes, 64 hexadecimal digits; makes the key where there is none.

    Raises OSError where it cannot be kept.
    """
    if _key() is None:
        _make_key(_path())
    return _mark(content, _key() or b"")


def is_ours(content: bytes, mark: str) -> bool:
    """Whether the mark is this user's, on these bytes."""
    key = _key()
    return key is not None and hmac.compare_digest(
        _mark(content, key).encode(), str(mark).encode("ascii", "replace")
    )


def named() -> frozenset[str]:
    """The sha256s of plans that the operator vouches for; raises UsageError for what are none."""
    texts = [text.strip().lower() for text in os.environ.get(VARIABLE, "").split(",")]
    if wrong := [text for text in texts if text and not re.fullmatch(r"[0-9a-f]{64}", text)]:
        raise UsageError(
            f"{VARIABLE} holds {wrong[0][:80]!r}; expected sha256s, 64 hexadecimal digits each, "
            "with commas between"
        )
    return frozenset(texts) - {""}


def write_ours(path: Path, content: bytes) -> None:
    """The content after its mark; raises OSError."""
    write_atomic(path, bytes.fromhex(mark_of(content)) + content)


def read_ours(path: Path) -> bytes:
    """What `write_ours` wrote; raises OSError if it was not by this user or is damaged."""
    try:
        data = read_bytes(path, MAX_MARKED)
    except ValueError as error:
        raise OSError(f"{path}: {error}") from error
    mark, content = data[:MARK_BYTES], data[MARK_BYTES:]
    if not is_ours(content, mark.hex()):
        raise OSError(f"{path} was not made here")
    return content


def _mark(content: bytes, key: bytes) -> str:
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _path() -> Path:
    return home() / "plans.key"


def _key() -> bytes | None:
    """None where there is none, or one that others could have read or written."""
    try:
        mode = _path().stat().st_mode & 0o077
        key = read_bytes(_path(), KEY_BYTES)
    except (OSError, ValueError):
        return None
    return None if mode or len(key) != KEY_BYTES else key


def _make_key(path: Path) -> None:
    """Two that make it at once get the same; one that is no key is made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, secrets.token_bytes(KEY_BYTES))
        os.fsync(file)
        if path.exists() and _key() is None:
            partial.replace(path)
        else:
            _link(partial, path)
    finally:
        os.close(file)
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """A rename that replaces nothing: who comes second uses the key of the first."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return
