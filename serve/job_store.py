"""Jobs on disk: a folder each, with `job.json` and, unless they are stored elsewhere, its images.

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

from sdrt.atomic_files import write_atomic
from sdrt.errors import StorageError

from .folders import claim_folder
from .result_store import FolderResults, ResultStore, open_s3_results
from .settings import Settings

log = logging.getLogger("sdrt.serve")

RECORD = "job.json"
QUEUED, COMPLETED, FAILED, CANCELLED = "queued", "completed", "failed", "cancelled"
PENDING, DELIVERED, GIVEN_UP = "pending", "delivered", "failed"  # of a webhook
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_JOBS = 100_000
DEFAULT_MAX_BYTES = 16 * 2**30
LOST = {"code": "job_lost", "message": "the server ended before the job did; submit it again"}


@dataclass(frozen=True, slots=True)
class Delivery:
    """The webhook of a job.

    Attributes:
        url: Where it is sent.
        status: pending, delivered or failed.
        attempts: How often it was sent.
        error: Why the last attempt failed.
        next_attempt_at: Not before this time; seconds since the epoch.
        delivered_at: When it was accepted.
    """

    url: str
    status: str = PENDING
    attempts: int = 0
    error: str | None = None
    next_attempt_at: float = 0.0
    delivered_at: float | None = None


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
        size_bytes: Of its images.
        delivery: Its webhook, if any.
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
    size_bytes: int = 0
    delivery: Delivery | None = None

    @property
    def image_names(self) -> list[str]:
        return [self.image_name(index) for index in range(len(self.seeds))]

    def image_name(self, index: int) -> str:
        return f"{index}.{self.output_format}"


def open_job_store(settings: Settings) -> "JobStore | None":
    """The store of a server that has a folder for jobs; raises UsageError if it is unusable."""
    if settings.jobs_folder is None:
        return None
    results = open_s3_results(settings.results_url) if settings.results_url else None
    store = JobStore(
        settings.jobs_folder, settings.keep_jobs_seconds, settings.max_jobs_bytes, results
    )
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
        max_bytes: Of all images; the oldest jobs are removed for new ones.
        results: Where the images are; None: in the folder.
    """

    folder: Path
    keep_seconds: float
    max_bytes: int = DEFAULT_MAX_BYTES
    results: ResultStore | None = None
    jobs: dict[str, StoredJob] = field(default_factory=dict)
    _lock: ExitStack = field(default_factory=ExitStack)

    def open(self) -> None:
        """Read the folder; jobs that a process left unfinished have failed.

        Raises:
            UsageError: The folder cannot be used, or another server uses it.
        """
        claim_folder(self.folder, self._lock, "for jobs", "--jobs")
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
                job = StoredJob(**{name: values[name] for name in names & values.keys()})
                if job.delivery is not None:
                    job = replace(job, delivery=Delivery(**values["delivery"]))
            except (OSError, ValueError, AttributeError, TypeError) as error:
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
        """Store a job's images, then that it is completed; raises OSError, StorageError."""
        names = [job.image_name(index) for index in range(len(images))]
        media_type = MEDIA_TYPES[job.output_format]
        try:
            for name, content in zip(names, images, strict=True):
                self._results.write(job.id, name, content, media_type)
        except BaseException:
            self._remove_images(job, names)
            raise
        size = sum(map(len, images))
        self.end(job, COMPLETED, seeds=list(seeds), size_bytes=size)
        self.remove_expired()

    @property
    def _results(self) -> ResultStore:
        return self.results or FolderResults(self.folder)

    def store_delivery(self, job_id: str, delivery: Delivery) -> None:
        """Store what became of a job's webhook, unless the job was removed; raises OSError."""
        if job := self.jobs.get(job_id):
            self._write(replace(job, delivery=delivery))

    def end(self, job: StoredJob, status: str, **changes: Any) -> None:
        """Store that a job has ended, unless it was removed; raises OSError."""
        if job.id in self.jobs:
            self._write(replace(job, status=status, completed_at=time.time(), **changes))

    def _write(self, job: StoredJob) -> None:
        content = json.dumps(asdict(job), indent=1).encode()
        write_atomic(self.folder / job.id / RECORD, content)
        self.jobs[job.id] = job

    def read_image(self, job: StoredJob, index: int) -> bytes:
        """Raises OSError, StorageError."""
        return self._results.read(job.id, job.image_name(index))

    def presign_image(self, job: StoredJob, index: int) -> str | None:
        """A URL of an image that is good until the job expires; None for images in the folder, and
        where it cannot be signed.
        """
        expires_at = self.expires_at(job) or time.time()
        seconds = expires_at - time.time()
        try:
            return self._results.presign(job.id, job.image_name(index), seconds)
        except StorageError as error:
            log.warning("cannot sign a URL of %s: %s", job.id, error)
            return None

    def expires_at(self, job: StoredJob) -> float | None:
        """When a job is removed; None before it has ended."""
        return None if job.completed_at is None else job.completed_at + self.keep_seconds

    def remove(self, job: StoredJob) -> None:
        """Forget a job and delete its files."""
        self.jobs.pop(job.id, None)
        self._remove_images(job, job.image_names)
        shutil.rmtree(self.folder / job.id, ignore_errors=True)

    def _remove_images(self, job: StoredJob, names: Sequence[str]) -> None:
        try:
            self._results.remove(job.id, names)
        except (OSError, StorageError) as error:
            log.warning("Cannot remove the images of %s: %s", job.id, error)

    def _has_expired(self, job: StoredJob) -> bool:
        moment = self.expires_at(job)
        return moment is not None and moment < time.time()

    def remove_expired(self) -> None:
        """Remove jobs that have ended long ago, and the oldest of too many or too large ones."""
        ended = [job for job in list(self.jobs.values()) if job.completed_at is not None]
        ended.sort(key=lambda job: job.completed_at or 0.0)
        surplus = max(0, len(self.jobs) - MAX_JOBS + 1)
        size = sum(job.size_bytes for job in ended)
        for index, job in enumerate(ended):
            is_newest = index == len(ended) - 1
            too_large = size > self.max_bytes and not is_newest
            if index < surplus or self._has_expired(job) or too_large:
                self.remove(job)
                size -= job.size_bytes
