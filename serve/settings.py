"""The configuration of a server: address, access control, limits."""

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sdrt.errors import UsageError

from .tracing import Tracing
from .webhook import WebhookSettings

DIGEST_PREFIX = "sha256:"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration of a server.

    Attributes:
        keys: SHA-256 digests of the accepted API keys; None disables authentication.
        hosts: Accepted names in the Host header; None accepts any.
        slots: Concurrent images of each engine.
        waiting: Queued images of each engine.
        deterministic: Whether results are bitwise independent of batching.
        drain_seconds: Time limit for running requests at shutdown.
        memory_budget: Bytes that the loaded models may need together; None: all are loaded at
            start and stay loaded.
        pinned_models: Models that are loaded at start and never evicted, under a memory budget.
        load_timeout_seconds: How long a request waits until its model is loaded.
        jobs_folder: Where jobs are stored; None: there are none.
        keep_jobs_seconds: How long a job stays after it has ended.
        max_jobs_bytes: Of the images of all jobs; the oldest jobs are removed for new ones.
        results_url: `s3://bucket/prefix` for the images of jobs; None: the jobs' folder.
        webhooks: Where jobs may be announced; None: nowhere.
        gallery_folder: Where all generated images are stored; None: nowhere.
        gallery_bytes: How much they may take; the oldest are removed.
        tracing: What records traces.
        max_size: (width, height) of the largest images; None is twice the sides of a bundle's
            largest size. A larger image would hold up all others of its engine.
        max_work: Images × pixels × steps of one request.
        max_body_bytes: Size of a request body.
        body_seconds: Time limit for receiving a body.
        header_seconds: Time limit for receiving the request line and headers.
        stall_seconds: How long a client may leave its response unread.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    keys: tuple[bytes, ...] | None = None
    hosts: tuple[str, ...] | None = LOCAL_HOSTS
    slots: int = 16
    waiting: int = 64
    deterministic: bool = False
    drain_seconds: float = 30.0
    memory_budget: int | None = None
    pinned_models: tuple[str, ...] = ()
    load_timeout_seconds: float = 300.0
    jobs_folder: Path | None = None
    keep_jobs_seconds: float = 86_400.0
    max_jobs_bytes: int = 16 * 2**30
    results_url: str | None = None
    webhooks: WebhookSettings | None = None
    gallery_folder: Path | None = None
    gallery_bytes: int = 10 * 2**30
    tracing: Tracing = field(default_factory=Tracing)
    log_prompts: bool = False
    max_size: tuple[int, int] | None = None
    max_work: int = 2**30
    max_body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0
    header_seconds: float = 15.0
    stall_seconds: float = 60.0


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def hash_key(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_key_digests(path: Path) -> tuple[bytes, ...]:
    """Read API keys from a file, one per line, plain or as `sha256:` and 64 hexadecimal digits.

    Returns:
        Their SHA-256 digests.

    Raises:
        UsageError: The file cannot be read or holds no key.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read API keys from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read API keys from {path}: it is not UTF-8") from error
    keys = tuple(_parse_keys(path, lines))
    if not keys:
        raise UsageError(
            f"{path} contains no API key",
            hint=f"write one key per line, plain or as {DIGEST_PREFIX}HEX",
        )
    return keys


def _parse_keys(path: Path, lines: Iterable[str]) -> Iterable[bytes]:
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not key.startswith(DIGEST_PREFIX):
            yield hash_key(key.encode())
            continue
        text = key.removeprefix(DIGEST_PREFIX)
        if len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef"):
            raise UsageError(
                f"{path}, line {number}: expected 64 hexadecimal digits after {DIGEST_PREFIX}"
            )
        yield bytes.fromhex(text)
