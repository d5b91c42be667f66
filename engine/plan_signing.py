"""HMAC signatures for compiled plans and kernels: only what this user built is loaded.

A plan is native code. A bundle from elsewhere brings its own sidecar, so the sha256 in it does not
show who built the plan. Knows a key of 32 random bytes in sdrt's home, which only its user
may read; not what is signed.

Plans that were built for this machine on another one are loaded if the operator lists their
sha256s, separated by commas, in `SDRT_TRUST_PLANS`.
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

TRUST_VARIABLE = "SDRT_TRUST_PLANS"
KEY_BYTES = SIGNATURE_BYTES = 32
MAX_SIGNED_BYTES = 2**30


def sign(content: bytes) -> str:
    """This user's signature, 64 hexadecimal digits; creates the key where there is none.

    Raises OSError where the key cannot be stored.
    """
    if _read_key() is None:
        _create_key(_key_path())
    return _hmac(content, _read_key() or b"")


def is_signature_valid(content: bytes, signature: str) -> bool:
    """Whether this user signed the content."""
    key = _read_key()
    return key is not None and hmac.compare_digest(
        _hmac(content, key).encode(), str(signature).encode("ascii", "replace")
    )


def trusted_hashes() -> frozenset[str]:
    """The sha256s of the plans that the operator trusts; raises UsageError for a malformed one."""
    texts = [text.strip().lower() for text in os.environ.get(TRUST_VARIABLE, "").split(",")]
    if wrong := [text for text in texts if text and not re.fullmatch(r"[0-9a-f]{64}", text)]:
        raise UsageError(
            f"{TRUST_VARIABLE} holds {wrong[0][:80]!r}; expected sha256s of 64 hexadecimal digits, "
            "separated by commas"
        )
    return frozenset(texts) - {""}


def write_signed(path: Path, content: bytes) -> None:
    """Write the signature and then the content; raises OSError."""
    write_atomic(path, bytes.fromhex(sign(content)) + content)


def read_signed(path: Path) -> bytes:
    """Read what `write_signed` wrote; raises OSError if another user wrote it or it is damaged."""
    try:
        data = read_bytes(path, MAX_SIGNED_BYTES)
    except ValueError as error:
        raise OSError(f"{path}: {error}") from error
    signature, content = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    if not is_signature_valid(content, signature.hex()):
        raise OSError(f"{path} was not written by this user")
    return content


def _hmac(content: bytes, key: bytes) -> str:
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _key_path() -> Path:
    return home() / "plans.key"


def _read_key() -> bytes | None:
    """The key; None where there is none, or where other users could have read or written it."""
    try:
        mode = _key_path().stat().st_mode & 0o077
        key = read_bytes(_key_path(), KEY_BYTES)
    except (OSError, ValueError):
        return None
    return None if mode or len(key) != KEY_BYTES else key


def _create_key(path: Path) -> None:
    """Processes that create it at the same time get the same key; an invalid one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, secrets.token_bytes(KEY_BYTES))
        os.fsync(file)
        if path.exists() and _read_key() is None:
            partial.replace(path)
        else:
            _link_unless_exists(partial, path)
    finally:
        os.close(file)
        partial.unlink(missing_ok=True)


def _link_unless_exists(partial: Path, path: Path) -> None:
    """A rename that replaces nothing: the second process uses the first one's key."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return
