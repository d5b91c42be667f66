"""Jobs: image requests that are submitted, polled and fetched later, in the style of OpenAI's
asynchronous endpoints.
"""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from sdrt.runtime.batching.request import RequestCancelled, RequestHandle
from sdrt.serve.control import build_control_options
from sdrt.serve.dependencies import EngineRequest, get_context, get_owner
from sdrt.serve.errors import ApiError, api_error_from_exception, json_response
from sdrt.serve.generation import build_openai_request, encode_image_file
from sdrt.serve.job_store import (
    CANCELLED,
    COMPLETED,
    FAILED,
    LOST,
    MEDIA_TYPES,
    Delivery,
    JobStore,
    StoredJob,
    new_job_id,
)
from sdrt.serve.schemas import JobRequest
from sdrt.serve.sse import EventStreamResponse, format_event
from sdrt.serve.strict_json import StrictRoute
from sdrt.serve.webhook import WebhookSettings, check_webhook_url
from sdrt.serve.webhook_delivery import WebhookSender

router = APIRouter(prefix="/v1/jobs", route_class=StrictRoute)

POLL_SECONDS, KEEPALIVE_SECONDS = 0.25, 15.0
EXPIRY_SECONDS = 600.0  # between two searches for jobs to remove


@dataclass(slots=True)
class RunningJobs:
    """The store of a server and its unfinished jobs.

    Attributes:
        store: None: jobs are switched off.
        webhooks: Where jobs may be announced; None: nowhere.
        handles: The images of each job, by its id.
        cancelled: The ids of those that clients have cancelled.
        tasks: What stores their results.
        lock: Held while a request with an idempotency key is looked up and stored.
    """

    store: JobStore | None = None
    webhooks: WebhookSettings | None = None
    handles: dict[str, Sequence[RequestHandle]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    sender: WebhookSender | None = None
    _expiry: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Announce what an earlier process did not, and remove jobs as they expire."""
        if self.store is None:
            return
        store = self.store
        self.sender = WebhookSender(self.webhooks, store, lambda job: _describe(self, store, job))
        self.sender.resume()
        self._expiry = asyncio.create_task(_remove_expired(store))

    def announce(self, job_id: str) -> None:
        """Send the webhook of a job that has ended, if it has one."""
        if self.sender is not None:
            self.sender.announce(job_id)

    async def finish(self, seconds: float) -> None:
        """Wait until the results of jobs that have ended are stored; webhooks that are not sent by
        then are sent by the next process.
        """
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=seconds)
        if self._expiry is not None:
            self._expiry.cancel()
        if self.sender is not None:
            await self.sender.close()

    def close(self) -> None:
        """Let another process use the folder."""
        if self.store is not None:
            self.store.close()


async def _remove_expired(store: JobStore) -> None:
    while True:
        await asyncio.sleep(EXPIRY_SECONDS)
        await asyncio.to_thread(store.remove_expired)


def _get_jobs(request: Request) -> tuple[RunningJobs, JobStore]:
    jobs: RunningJobs = request.app.state.running_jobs
    if jobs.store is None:
        message = "this server stores no jobs; start it with --jobs FOLDER"
        raise ApiError(400, message, code="jobs_unavailable")
    return jobs, jobs.store


def _find(request: Request, store: JobStore, job_id: str) -> StoredJob:
    if job := store.find(job_id, get_owner(request)):
        return job
    raise ApiError(404, f"unknown job {job_id!r}", code="job_not_found")


@router.post("")
async def create_job(
    request: Request,
    body: JobRequest,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Response:
    """Submit a request; poll the job, or follow its events."""
    jobs, store = _get_jobs(request)
    if body.stream:
        raise ApiError(400, "stream is not supported by jobs; follow their events", "stream")
    if body.webhook is not None:
        check_webhook_url(body.webhook, jobs.webhooks)
    content = body.model_dump_json().encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(content).hexdigest()
    known = idempotency_key and store.find_by_key(idempotency_key, get_owner(request))
    if not known:
        inputs = await get_context(request).run_in_thread(build_control_options, body)
        async with get_context(request).models.use(body.model) as model:
            engine_request = build_openai_request(model, body, inputs)
            if idempotency_key is None:
                return await _submit(request, body, engine_request, digest, None)
            async with jobs.lock:  # so that two equal requests do not both find no job
                known = store.find_by_key(idempotency_key, get_owner(request))
                if known is None:
                    return await _submit(request, body, engine_request, digest, idempotency_key)
    if known.digest != digest:
        message = "another request was sent with this Idempotency-Key"
        raise ApiError(409, message, code="idempotency_key_reused")
    return await _respond(request, known)


async def _submit(
    request: Request,
    body: JobRequest,
    engine_request: EngineRequest,
    digest: str,
    idempotency_key: str | None,
) -> Response:
    """Start a new job and store it."""
    (jobs, store), context = _get_jobs(request), get_context(request)
    job = StoredJob(
        id=new_job_id(),
        owner=get_owner(request),
        model=engine_request.model.name,
        digest=digest,
        idempotency_key=idempotency_key,
        output_format=body.output_format or "png",
        size=engine_request.output_size,
        created_at=time.time(),
        delivery=None if body.webhook is None else Delivery(body.webhook),
    )
    handles = (await context.submit(engine_request, owner=get_owner(request))).handles
    jobs.handles[job.id] = handles
    try:
        await context.run_in_thread(store.add, job)
    except BaseException:
        _cancel(jobs.handles.pop(job.id))
        raise
    task = asyncio.create_task(_follow(request, jobs, store, job, body))
    jobs.tasks.add(task)
    task.add_done_callback(jobs.tasks.discard)
    return await _respond(request, job, 202)


async def _respond(request: Request, job: StoredJob, status: int = 200) -> Response:
    """The job object; in a thread, as a result store may have to renew what it signs URLs with."""
    jobs, store = _get_jobs(request)
    described = await get_context(request).run_in_thread(_describe, jobs, store, job)
    return json_response(described, status)


async def _follow(
    request: Request, jobs: RunningJobs, store: JobStore, job: StoredJob, body: JobRequest
) -> None:
    """Store a job's images when they are finished, or why there are none."""
    context = get_context(request)
    try:
        futures = [asyncio.wrap_future(handle.future) for handle in jobs.handles[job.id]]
        images = await asyncio.gather(*futures)
        files = [
            await context.encode_in_thread(encode_image_file, item.image, body, item.parameters)
            for item in images
        ]
        seeds = [image.seed for image in images]
        await context.run_in_thread(store.complete, job, files, seeds)
    except (RequestCancelled, asyncio.CancelledError):
        _cancel(jobs.handles[job.id])
        if job.id in jobs.cancelled:
            store.end(job, CANCELLED)
        else:  # by a server that ends
            store.end(job, FAILED, error=LOST)
    except Exception as error:
        _cancel(jobs.handles[job.id])
        api_error = api_error_from_exception(error)
        cause = {"code": api_error.code or "error", "message": api_error.message}
        store.end(job, FAILED, error=cause)
    finally:
        del jobs.handles[job.id]
        jobs.cancelled.discard(job.id)
        jobs.announce(job.id)


def _cancel(handles: Sequence[RequestHandle]) -> None:
    for handle in handles:
        handle.cancel()


def _describe(jobs: RunningJobs, store: JobStore, job: StoredJob) -> dict[str, Any]:
    """The job object of responses, events and webhooks."""
    status, progress = _get_progress(jobs, job)
    images = [_describe_image(store, job, index) for index in range(len(job.seeds))]
    return {
        "id": job.id,
        "object": "image.job",
        "status": status,
        "progress": progress,
        "model": job.model,
        "size": job.size,
        "output_format": job.output_format,
        "created_at": int(job.created_at),
        "completed_at": _whole_seconds(job.completed_at),
        "expires_at": _whole_seconds(store.expires_at(job)),
        "error": job.error,
        "webhook": _describe_delivery(job.delivery),
        "data": images,
    }


def _describe_image(store: JobStore, job: StoredJob, index: int) -> dict[str, Any]:
    url = f"/v1/jobs/{job.id}/images/{index}"
    image: dict[str, Any] = {"url": url, "seed": job.seeds[index]}
    if presigned := store.presign_image(job, index):
        image["presigned_url"] = presigned
    return image


def _describe_delivery(delivery: Delivery | None) -> dict[str, Any] | None:
    if delivery is None:
        return None
    return {
        "url": delivery.url,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "error": delivery.error,
        "delivered_at": _whole_seconds(delivery.delivered_at),
    }


def _whole_seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def _get_progress(jobs: RunningJobs, job: StoredJob) -> tuple[str, int]:
    """The status, and the share of the evaluations that are done, in per cent."""
    if job.status == COMPLETED:
        return job.status, 100
    handles = jobs.handles.get(job.id, ())
    total = sum(handle.num_evaluations for handle in handles)
    done = sum(handle.evaluations_done for handle in handles)
    started = any(handle.state != "waiting" for handle in handles)
    status = "in_progress" if job.completed_at is None and started else job.status
    return status, 99 * done // total if total else 0


@router.get("")
async def list_jobs(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
    """The jobs that came with the same API key, newest first."""
    jobs, store = _get_jobs(request)
    own = store.owned_by(get_owner(request))
    data = await get_context(request).run_in_thread(
        lambda: [_describe(jobs, store, job) for job in own[:limit]]
    )
    return json_response({"object": "list", "data": data, "has_more": len(own) > limit})


@router.get("/{job_id}")
async def get_job(request: Request, job_id: str) -> Response:
    """One job: its status, its progress and, once it is completed, its images."""
    _, store = _get_jobs(request)
    return await _respond(request, _find(request, store, job_id))


@router.get("/{job_id}/images/{index}")
async def get_image(request: Request, job_id: str, index: int) -> Response:
    """One image of a completed job."""
    _, store = _get_jobs(request)
    job = _find(request, store, job_id)
    if job.status != COMPLETED or not 0 <= index < len(job.seeds):
        raise ApiError(404, f"job {job_id!r} has no image {index}", code="image_not_found")
    try:
        content = await get_context(request).run_in_thread(store.read_image, job, index)
    except FileNotFoundError:  # removed since, or by others
        message = f"image {index} of job {job_id!r} is no longer stored"
        raise ApiError(404, message, code="image_not_found") from None
    return Response(content, media_type=MEDIA_TYPES[job.output_format])


@router.get("/{job_id}/events")
async def follow_job(request: Request, job_id: str) -> Response:
    """Server-sent events: `job` at every change, until the job has ended."""
    jobs, store = _get_jobs(request)
    _find(request, store, job_id)
    return EventStreamResponse(_job_events(request, jobs, store, job_id))


async def _job_events(
    request: Request, jobs: RunningJobs, store: JobStore, job_id: str
) -> AsyncGenerator[bytes, None]:
    before, quiet = None, 0.0
    while not await request.is_disconnected():
        job = _find(request, store, job_id)
        described = await get_context(request).run_in_thread(_describe, jobs, store, job)
        if described != before:
            before, quiet = described, 0.0
            yield format_event("job", described)
        if job.completed_at is not None:
            return
        await asyncio.sleep(POLL_SECONDS)
        quiet += POLL_SECONDS
        if quiet >= KEEPALIVE_SECONDS:
            quiet = 0.0
            yield b":\n\n"


@router.post("/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str) -> Response:
    """Cancel a job; one that has ended stays as it is."""
    jobs, store = _get_jobs(request)
    job = _find(request, store, job_id)
    await _cancel_running(jobs, job)
    return await _respond(request, _find(request, store, job_id))


async def _cancel_running(jobs: RunningJobs, job: StoredJob) -> None:
    """Cancel a job and wait until that is stored."""
    if job.id in jobs.handles:
        jobs.cancelled.add(job.id)
        _cancel(jobs.handles[job.id])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                while job.id in jobs.handles:
                    await asyncio.sleep(0.01)


@router.delete("/{job_id}")
async def delete_job(request: Request, job_id: str) -> Response:
    """Cancel a job if it runs, and delete its images."""
    jobs, store = _get_jobs(request)
    job = _find(request, store, job_id)
    await _cancel_running(jobs, job)
    await get_context(request).run_in_thread(store.remove, job)
    return json_response({"id": job.id, "object": "image.job.deleted", "deleted": True})
