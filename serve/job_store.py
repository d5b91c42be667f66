"""Jobs on disk: a folder each, with `job.json` and, once it is completed, its images.

Knows files; no engines and no requests. One process at a time uses a folder.
"""

import json
import logging
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sdrt.atomic_files import locked, write_atomic
from sdrt.errors import UsageError

from .settings import Settings

log = logging.getLogger("sdrt.serve")

RECORD = "job.json"
QUEUED, COMPLETED, FAILED, CANCELLED = "queued", "completed", "failed", "cancelled"
MAX_JOBS = 100_000
LOST = {"code": "job_lost", "message": "the server ended before the job did; submit it again"}


@dataclass(frozen=True, slots=True)
class StoredJob:
    """One accepted request.

    Attributes:
        id: Random; also the name of its folder.
        owner: The digest of the API key that it came with; empty without keys.
        model: The model that it asks for.
        digest: Of the request's body.
        idempotency_key: The client's, if any.
        output_format: png, jpeg or webp.
        created_at: Seconds since the epoch.
        completed_at: When it ended; None before.
        status: queued until it has ended; completed, failed or cancelled.
        size: WIDTHxHEIGHT of its images.
        seeds: Of its images, once they are completed.
        error: Why it failed: code and message.
    """

    id: str
    owner: str
    model: str
    digest: str
    idempotency_key: str | None
    output_format: str
    size: str
    created_at: float
    completed_at: float | None = None
    status: str = QUEUED
    seeds: Sequence[int] = ()
    error: dict[str, str] | None = None

    def image_name(self, index: int) -> str:
        return f"{index}.{self.output_format}"


def open_job_store(settings: Settings) -> "JobStore | None":
    """The store of a server that has a folder for jobs; raises UsageError if it is unusable."""
    if settings.jobs_folder is None:
        return None
    store = JobStore(settings.jobs_folder, settings.keep_jobs_seconds)
    store.open()
    return store


def new_job_id() -> str:
    return f"job_{secrets.token_hex(16)}"


@dataclass(slots=True)
class JobStore:
    """The jobs of a folder, by id.

    Attributes:
        folder: Created if it is missing.
        keep_seconds: How long a job stays after it has ended.
    """

    folder: Path
    keep_seconds: float
    jobs: dict[str, StoredJob] = field(default_factory=dict)
    _lock: ExitStack = field(default_factory=ExitStack)

    def open(self) -> None:
        """Read the folder; jobs that a process left unfinished have failed.

        Raises:
            UsageError: The folder cannot be used, or another server uses it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.folder, wait=False))
        except BlockingIOError:
            raise UsageError(
                f"another server uses {self.folder}", hint="choose another folder with --jobs"
            ) from None
        except OSError as error:
            raise UsageError(f"cannot use {self.folder} for jobs: {error.strerror}") from error
        for job in self._read():
            self.jobs[job.id] = job
            if job.completed_at is None:
                self.end(job, FAILED, error=LOST)

    def close(self) -> None:
        self._lock.close()

    def _read(self) -> Iterator[StoredJob]:
        names = {option.name for option in fields(StoredJob)}
        for path in sorted(self.folder.glob(f"job_*/{RECORD}")):
            try:
                values = json.loads(path.read_text("utf-8"))
                job = StoredJob(**{name: values[name] for name in names})
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("Ignoring %s: %s", path, error)
                continue
            if job.id == path.parent.name:
                yield job

    def find(self, job_id: str, owner: str) -> StoredJob | None:
        """A job of one owner that has not expired."""
        job = self.jobs.get(job_id)
        return job if job and job.owner == owner and not self._has_expired(job) else None

    def owned_by(self, owner: str) -> list[StoredJob]:
        """The jobs of one owner that have not expired, newest first."""
        own = [job for job in list(self.jobs.values()) if self.find(job.id, owner)]
        return sorted(own, key=lambda job: job.created_at, reverse=True)

    def find_by_key(self, key: str, owner: str) -> StoredJob | None:
        """The job of one owner with an idempotency key."""
        keyed = (job for job in list(self.jobs.values()) if job.idempotency_key == key)
        return next((job for job in keyed if self.find(job.id, owner)), None)

    def add(self, job: StoredJob) -> None:
        """Store a new job; raises OSError."""
        self.remove_expired()
        (self.folder / job.id).mkdir()
        self._write(job)

    def complete(self, job: StoredJob, images: Sequence[bytes], seeds: Sequence[int]) -> None:
        """Store a job's images, then that it is completed; raises OSError."""
        for index, content in enumerate(images):
            write_atomic(self.folder / job.id / job.image_name(index), content)
        self.end(job, COMPLETED, seeds=list(seeds))

    def end(self, job: StoredJob, status: str, **changes: Any) -> None:
        """Store that a job has ended, unless it was removed; raises OSError."""
        if job.id in self.jobs:
            self._write(replace(job, status=status, completed_at=time.time(), **changes))

    def _write(self, job: StoredJob) -> None:
        content = json.dumps(asdict(job), indent=1).encode()
        write_atomic(self.folder / job.id / RECORD, content)
        self.jobs[job.id] = job

    def read_image(self, job: StoredJob, index: int) -> bytes:
        """Raises OSError."""
        return (self.folder / job.id / job.image_name(index)).read_bytes()

    def expires_at(self, job: StoredJob) -> float | None:
        """When a job is removed; None before it has ended."""
        return None if job.completed_at is None else job.completed_at + self.keep_seconds

    def remove(self, job: StoredJob) -> None:
        """Forget a job and delete its files."""
        self.jobs.pop(job.id, None)
        shutil.rmtree(self.folder / job.id, ignore_errors=True)

    def _has_expired(self, job: StoredJob) -> bool:
        moment = self.expires_at(job)
        return moment is not None and moment < time.time()

    def remove_expired(self) -> None:
        """Remove jobs that have ended long ago, and the oldest of too many."""
        ended = [job for job in list(self.jobs.values()) if job.completed_at is not None]
        ended.sort(key=lambda job: job.completed_at or 0.0)
        surplus = max(0, len(self.jobs) - MAX_JOBS + 1)
        for index, job in enumerate(ended):
            if index < surplus or self._has_expired(job):
                self.remove(job)
