"""Delivery of webhooks: every job that has ended is announced at least once, with retries.

What is still to be sent is in the job store, so that it survives the process. Knows jobs and
times; not how a message is signed and sent.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from .job_store import DELIVERED, GIVEN_UP, PENDING, Delivery, JobStore, StoredJob
from .webhook import WebhookError, WebhookSettings, send_message

log = logging.getLogger("sdrt.serve")

FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 5.0, 14_400.0
MAX_SECONDS = 86_400.0  # from the job's end to the last attempt
MAX_CONCURRENT = 16


@dataclass(slots=True)
class WebhookSender:
    """Announces the jobs of a store that have ended.

    Attributes:
        settings: Where messages may go; None: nowhere.
        store: The jobs and what is still to be sent.
        describe: A job as clients read it.
        first_delay: Seconds before the second attempt; each further wait is four times as long.
    """

    settings: WebhookSettings | None
    store: JobStore
    describe: Callable[[StoredJob], dict[str, Any]]
    first_delay: float = FIRST_DELAY_SECONDS
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_CONCURRENT))

    def resume(self) -> None:
        """Announce the jobs that an earlier process did not."""
        for job in list(self.store.jobs.values()):
            self.announce(job.id)

    def announce(self, job_id: str) -> None:
        """Begin to send the message of a job, if it has ended and has a webhook."""
        job = self.store.jobs.get(job_id)
        if job_id in self._tasks or self.settings is None or not _is_due(job):
            return
        task = asyncio.create_task(self._deliver(job_id))
        self._tasks[job_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    async def close(self) -> None:
        """Stop; the next process goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self, job_id: str) -> None:
        """Attempts until one succeeds, the time is over, or the job is removed."""
        while job := self.store.jobs.get(job_id):
            if job.delivery is None or job.delivery.status != PENDING:
                return
            await asyncio.sleep(max(0.0, job.delivery.next_attempt_at - time.time()))
            async with self._slots:
                if job := self.store.jobs.get(job_id):
                    await self._attempt(job)

    async def _attempt(self, job: StoredJob) -> None:
        assert job.delivery is not None and self.settings is not None
        try:
            described = await asyncio.to_thread(self.describe, job)
            body = build_message(job, described)
            await send_message(self.settings, job.delivery.url, _message_id(job), body)
        except WebhookError as error:
            delivery = self._after_failure(job, error)
        except Exception as error:
            log.warning("The webhook of %s failed: %s", job.id, type(error).__name__)
            delivery = self._after_failure(job, WebhookError("the server failed"))
        else:
            delivery = replace(
                job.delivery,
                status=DELIVERED,
                attempts=job.delivery.attempts + 1,
                error=None,
                delivered_at=time.time(),
            )
        try:
            await asyncio.to_thread(self.store.store_delivery, job.id, delivery)
        except OSError as error:  # of a full disk: the message is sent again
            log.error("Cannot store that the webhook of %s was sent: %s", job.id, error)
            await asyncio.sleep(self.first_delay)

    def _after_failure(self, job: StoredJob, error: WebhookError) -> Delivery:
        """The next attempt after a wait of 5 s, 20 s, … 4 h with a jitter, or none."""
        assert job.delivery is not None and job.completed_at is not None
        attempts = job.delivery.attempts + 1
        delay = min(self.first_delay * 4.0 ** min(attempts - 1, 10), MAX_DELAY_SECONDS)
        moment = time.time() + delay * random.uniform(0.8, 1.2)
        last = job.completed_at + min(MAX_SECONDS, self.store.keep_seconds)
        is_over = error.is_final or moment > last
        if is_over:
            log.warning("Webhook of %s given up after %d attempts: %s", job.id, attempts, error)
        return replace(
            job.delivery,
            status=GIVEN_UP if is_over else PENDING,
            attempts=attempts,
            error=error.message,
            next_attempt_at=moment,
        )


def _is_due(job: StoredJob | None) -> bool:
    pending = job is not None and job.delivery is not None and job.delivery.status == PENDING
    return pending and job is not None and job.completed_at is not None


def _message_id(job: StoredJob) -> str:
    return f"msg_{job.id.removeprefix('job_')}"


def build_message(job: StoredJob, described: dict[str, Any]) -> bytes:
    """The message of a job that has ended: its type, when it ended, and the job.

    Args:
        job: The job.
        described: The job as clients read it.
    """
    assert job.completed_at is not None
    ended = datetime.fromtimestamp(job.completed_at, UTC)
    message = {
        "type": f"image.job.{job.status}",
        "timestamp": ended.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": {name: value for name, value in described.items() if name != "webhook"},
    }
    return json.dumps(message, separators=(",", ":")).encode("ascii")
