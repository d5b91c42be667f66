"""The configuration of a server: address, access control, limits."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from .api_keys import ApiKey
from .tracing import Tracing
from .webhook import WebhookSettings

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration of a server.

    Attributes:
        keys: The accepted API keys; None disables authentication.
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
    keys: tuple[ApiKey, ...] | None = None
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
