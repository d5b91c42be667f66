"""In-flight batching: requests join and leave between evaluations and share calls of the model.

    with InflightBatcher(sdrt.load("shapes")) as batcher:
        handles = batcher.submit("a red circle", {"num_inference_steps": 20, "seed": 0})
        handles[0].future.result().image.save("circle.png")

Requests may differ in timestep, steps, sampler, guidance and seed. Three threads work: one prepares
(prompts, input images), one evaluates the model, one decodes, so that a long decode does not stall
the loop.

Knows pipelines and the scheduler; not requests over a network.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

from sdrt.bundle.manifest import CONTROL, LORA_PARTS
from sdrt.engine.protocol import LimitedRows
from sdrt.errors import DeviceLostError
from sdrt.runtime.arguments import GenerationKwargs, merge_arguments, parse_options
from sdrt.runtime.controlnet.unit import mean_cost
from sdrt.runtime.denoising import BatchBuilder, DenoisingState, LatentEdit, build_step
from sdrt.runtime.job import GenerationJob, uses_control_graph
from sdrt.runtime.lora.rows import load_lora_engine
from sdrt.runtime.lora.sets import LoraSet, Named, group_by_lora_set, merge_loras
from sdrt.runtime.lora.switch import LoraSwitch
from sdrt.runtime.output import annotate_image
from sdrt.runtime.parsing import float_parser, int_parser, parse_callable
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.requests import Request
from sdrt.runtime.stages import PipelineStages, Prompt

from .admission import check_deadlines, check_memory_for, check_queue
from .cost_model import CostModel, is_model_callable, load_cost_model
from .request import (
    GeneratedImage,
    Observer,
    OnStep,
    RequestCancelled,
    RequestGroup,
    RequestHandle,
    RequestRejected,
    RequestTimes,
    as_sdrt_error,
    schedule_pass,
)
from .scheduler import ScheduledRequest, select_batch, set_deadlines_in_order

log = logging.getLogger(__name__)
MAX_DEADLINE = 86400.0
DEADLINE = float_parser(1e-9, MAX_DEADLINE, f"seconds from now, at most {MAX_DEADLINE:g}")
PRIORITY = int_parser(-100, 100)
MAX_RECOVERY_PAUSE = 30.0  # seconds between attempts to recover a failed device


class InflightBatcher:
    """Batches requests in flight; a context manager, which calls `start` and `close`."""

    def __init__(
        self,
        pipe: Pipeline,
        *,
        slots: int = 16,
        waiting: int = 64,
        rows: int | None = None,
        deterministic: bool = False,
        observer: Observer | None = None,
        reload: Callable[[], Pipeline] | None = None,
        cost_cache: Path | None = None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            pipe: The pipeline; it remains the caller's to close.
            slots: Requests in flight at the same time; a request is one image.
            waiting: Length of the waiting queue.
            rows: Largest batch of a call of the model; by default as many as are measured to pay.
            deterministic: Pad every call to that many rows, for backends whose results depend on
                the batch size.
            observer: Called with what happens, for metrics.
            reload: Returns a new pipeline after the device failed.
            cost_cache: Folder for measured costs, such as the bundle's `plans`.
        """
        count = int_parser(1, 10_000)
        rows = None if rows is None else count("rows", rows)
        self.pipe = pipe
        self.slots, self.max_waiting = count("slots", slots), count("waiting", waiting)
        self.state: Literal["loading", "ready", "draining", "broken", "lost", "closed"] = "loading"
        self.device_error: DeviceLostError | None = None  # why it is lost
        self.cost_model: CostModel
        self._rows, self._deterministic = rows, deterministic
        self._observer, self._reload, self._cost_cache = observer, reload, cost_cache
        self._changed = threading.Condition()
        self._waiting: list[RequestHandle] = []
        self._running: list[RequestHandle] = []
        self._decoding: list[RequestHandle] = []
        self._batch_builder = BatchBuilder()
        self._threads: list[threading.Thread] = []
        self._reloaded = False
        self._loras = LoraSwitch(pipe)

    def start(self) -> None:
        """Measure what calls cost, unless cached, and start the threads."""
        with self.pipe.leases.call():
            max_rows = self._rows or 2 * self.slots
            if isinstance(unet := self.pipe.engines["unet"], LimitedRows):
                max_rows = min(max_rows, unet.max_rows)
            self.cost_model = load_cost_model(self.pipe, max_rows, self._cost_cache)
        if self._deterministic and self._rows is None:
            self._rows = max(2, *(size.max_rows for size in self.cost_model.sizes.values()))
        self.estimates = self.cost_model.estimates(self._rows)
        self._batch_builder = BatchBuilder(self._rows or 0 if self._deterministic else 0)
        for work in (self._prepare, self._denoise, self._decode):
            name = f"sdrt{work.__name__}"
            thread = threading.Thread(target=self._run_thread, args=(work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self.state = "ready"

    def submit(
        self,
        prompt: Prompt,
        options: Mapping[str, Any] | None = None,
        *,
        scheduler: str | Mapping[str, Any] | None = None,
        priority: int = 0,
        deadline: float | None = None,
        on_step: OnStep | None = None,
        loras: Named | None = None,
        **arguments: Unpack[GenerationKwargs],
    ) -> list[RequestHandle]:
        """Submit the images of one call; all are accepted or none.

        Args:
            prompt: One or several, or None for a model without a text encoder.
            options: The keyword arguments of a `Pipeline` call, as a mapping.
            scheduler: As for `Pipeline.with_scheduler`.
            priority: -100 to 100; larger goes first.
            deadline: Seconds from now.
            on_step: Called after each evaluation in the batcher's thread; must return quickly.
            loras: LoRA files by name (`str`, in the folder `loras`) or path (`Path`) with their
                weights, in addition to those named by tags in the prompts.
            **arguments: The same keyword arguments by name.

        Returns:
            One handle for each image, in order.

        Raises:
            UsageError: An argument is invalid.
            RequestRejected: The queue is full, memory is missing, or a deadline cannot be met.
        """
        if deadline is not None:
            deadline = DEADLINE("deadline", deadline)
        priority = PRIORITY("priority", priority)
        if on_step is not None:
            parse_callable("on_step", on_step)
        chosen = parse_options(merge_arguments(options, arguments))
        self._check_ready()
        pipe = self.pipe
        if scheduler is not None and not (isinstance(scheduler, str) and not scheduler):
            pipe = pipe.with_scheduler(scheduler)
        job = pipe.create_job(prompt, chosen)
        now = time.monotonic()

        def create_handle(
            request: Request, group: RequestGroup, weights: LoraSet | None
        ) -> RequestHandle:
            timeline = job.get_timeline(request)
            table, rows = job.get_table(timeline), job.get_num_rows(timeline)
            scheduled = ScheduledRequest(
                (job.size, weights), rows, table.evaluations, now, now, priority
            )
            scheduled.graph = _required_graph(group.job)
            scheduled.full_fraction = table.full_fraction
            if job.later_pass:
                scheduled.later_pass = schedule_pass(job.later_pass, request, weights)
            scheduled.control_cost = mean_cost(job.control_units, table.evaluations)
            scheduled.has_deadline = deadline is not None
            default = self.estimates.default_deadline(scheduled)
            scheduled.deadline = default if deadline is None else now + deadline
            return RequestHandle(
                request, job.total_evaluations, RequestTimes(now), scheduled, group, self._cancel
            )

        handles, base = [], self._loras.base
        for files, part in group_by_lora_set(job.requests, chosen, base, loras).items():
            own = replace(job, requests=part)
            factors = self._loras.find_factors(pipe, own, files or ())
            weights = base if factors else merge_loras(base, files or ())
            group = RequestGroup(
                own.with_lora(factors) if factors else own,
                on_step,
                None if files is None else weights,
            )
            key = None if weights == base else weights
            handles += [create_handle(request, group, key) for request in part]
        handles.sort(key=lambda handle: handle.request.index)
        set_deadlines_in_order([handle.scheduled for handle in handles])
        with self._changed:
            try:
                self._check_admission(handles, now)
            except RequestRejected as rejected:
                if self._observer:
                    self._observer.request_rejected(rejected.cause)
                raise
            self._waiting += handles
            self._changed.notify_all()
        return handles

    def _check_ready(self) -> None:
        if self.device_error:
            raise RequestRejected("broken", str(self.device_error), MAX_RECOVERY_PAUSE)
        if self.state == "broken":
            message = "device error; the engine is restarting"
            raise RequestRejected("broken", message, MAX_RECOVERY_PAUSE)
        if self.state != "ready":
            raise RequestRejected("draining", f"the engine is {self.state}", MAX_RECOVERY_PAUSE)

    def _check_admission(self, handles: Sequence[RequestHandle], now: float) -> None:
        """Raise RequestRejected unless all can be accepted and every accepted deadline be met."""
        self._check_ready()
        new = [handle.scheduled for handle in handles]
        others = [handle.scheduled for handle in (*self._running, *self._waiting)]
        check_memory_for(new[0], self.cost_model)
        check_queue(
            len(new),
            len(self._waiting),
            self.max_waiting,
            others,
            now,
            self.estimates,
            self.slots,
        )
        check_deadlines(new, others, now, self.estimates, self.slots)

    def unfinished(self) -> list[RequestHandle]:
        """Handles that are not finished, in the order in which the scheduler runs them."""
        now = time.monotonic()
        with self._changed:
            ahead = [
                *self._decoding,
                *sorted(self._running, key=lambda t: t.scheduled.sort_key(now)),
            ]
            return [*ahead, *sorted(self._waiting, key=lambda t: t.scheduled.sort_key(now))]

    def drain(self, seconds: float) -> bool:
        """Reject new requests and wait for the others; returns whether all finished in time."""
        with self._changed:
            if self.state == "ready":
                self.state = "draining"
            return self._changed.wait_for(lambda: not self._all_handles(), timeout=seconds)

    def close(self) -> None:
        """Stop the threads and cancel unfinished requests. The pipeline stays open."""
        with self._changed:
            self.state = "closed"
            self._changed.notify_all()
        for thread in self._threads[1:]:
            thread.join()
        # The first thread may wait for a LoRA change that waits for these leases.
        for handle in self._all_handles():
            handle.release()
        for thread in self._threads[:1]:
            thread.join()
        for handle in self._all_handles():
            self._finish(handle, RequestCancelled("the batcher was closed"))
        if self._reloaded:
            self.pipe.close()

    def __enter__(self) -> "InflightBatcher":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _is_over(self) -> bool:
        return self.state in ("lost", "closed")

    def _all_handles(self) -> list[RequestHandle]:
        return [*self._waiting, *self._running, *self._decoding]

    def _cancel(self, handle: RequestHandle) -> None:
        with self._changed:
            handle.cancel_requested = True
            if handle.state == "waiting":
                self._finish(handle, RequestCancelled("cancelled"))
            self._changed.notify_all()

    def _finish(self, handle: RequestHandle, result: GeneratedImage | Exception) -> None:
        """Set the result of a request, an image or an error, and free its slot. The first result
        counts: a thread may finish what a lost device has ended.
        """
        with self._changed:
            if handle.state in ("done", "failed", "cancelled"):
                return
            for place in (self._waiting, self._running, self._decoding):
                if handle in place:
                    place.remove(handle)
            handle.run = handle.edit = None
            handle.release()
            if isinstance(result, GeneratedImage):
                handle.state = "done"
            else:
                handle.state = "cancelled" if isinstance(result, RequestCancelled) else "failed"
            self._changed.notify_all()
        if self._observer:
            self._observer.request_finished(handle)
        if isinstance(result, GeneratedImage):
            handle.future.set_result(result)
        else:
            handle.future.set_exception(result)
        if isinstance(result, DeviceLostError):
            self._lose_device(result)

    def _lose_device(self, error: DeviceLostError) -> None:
        """Finish everything: no reload helps, only a new process."""
        with self._changed:
            if self.device_error or self.state == "closed":
                return
            self.state, self.device_error = "lost", error
            self._changed.notify_all()
        for handle in self._all_handles():
            self._finish(handle, error)

    def _next(self, candidates: Callable[[], list[RequestHandle]]) -> list[RequestHandle]:
        """Wait for candidates and return them in the scheduler's order; none once closed. Those
        that were cancelled are ended.
        """
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_over or (self.state != "broken" and candidates())
                )
                ready = [] if self._is_over else list(candidates())
                cancelled = [handle for handle in ready if handle.cancel_requested]
            for handle in cancelled:  # one cancelled from here on takes part once more
                self._finish(handle, RequestCancelled("cancelled"))
            if len(cancelled) < len(ready) or not ready:
                now = time.monotonic()
                remaining = (handle for handle in ready if handle not in cancelled)
                return sorted(remaining, key=lambda handle: handle.scheduled.sort_key(now))

    def _run_thread(self, work: Callable[[], None]) -> None:
        """Run a thread. An unexpected error closes the batcher."""
        try:
            work()
        except Exception as error:
            log.exception("in-flight batching failed")
            self.state = "closed"
            for handle in self._all_handles():
                self._finish(handle, as_sdrt_error(error))

    def _prepare(self) -> None:
        """Thread: encode the prompts of requests that get a slot."""

        def candidates() -> list[RequestHandle]:
            begun = len(self._running) + len(self._decoding)
            if begun >= self.slots:
                return []
            return self._loras.eligible(self.pipe, self._waiting, begun > 0)

        while ordered := self._next(candidates):
            handle = ordered[0]
            with self._changed:
                if handle.state != "waiting":
                    continue
                self._waiting.remove(handle)
                self._running.append(handle)
                handle.state, handle.scheduled.started = "preparing", True
            handle.times.started = time.monotonic()
            try:
                handle.lease = self._loras.begin(self.pipe, handle)
                with handle.lease.held():
                    if handle.group.job.options.returns_image:
                        self._return_image(handle)
                        continue
                    run, edit = self._prepare_state(handle)
            except Exception as error:
                self._finish(handle, as_sdrt_error(error))
                continue
            handle.times.prepared = time.monotonic()
            self._start_pass(handle, run, edit)

    def _start_pass(
        self, handle: RequestHandle, run: DenoisingState, edit: LatentEdit | None
    ) -> None:
        """Let a request take part in calls of the model."""
        shapes = run.conditioning.shapes
        with self._changed:
            handle.scheduled.batch_key = (*handle.scheduled.batch_key[:2], shapes)  # type: ignore[index]
            handle.scheduled.component = run.component
            handle.scheduled.image_tokens = run.conditioning.image_tokens
            handle.run, handle.edit, handle.state = run, edit, "running"
            self._changed.notify_all()

    def _return_image(self, handle: RequestHandle) -> None:
        """At strength 0 the result is the input image."""
        job = handle.group.job
        try:
            image = self.pipe.input_image(job)
            text = self.pipe.parameters_text(handle.request, job)
        except Exception as error:
            self._finish(handle, as_sdrt_error(error))
            return
        handle.times.prepared = handle.times.denoised = handle.times.decoded = time.monotonic()
        self._finish(handle, GeneratedImage(annotate_image(image, text), text, handle.request.seed))

    def _prepare_state(self, handle: RequestHandle) -> tuple[DenoisingState, LatentEdit | None]:
        group = handle.group
        if group.failed:
            raise group.failed
        weights = self.pipe.leases, self.pipe.leases.changes
        if group.prepared is None or group.weights != weights:  # prompts are encoded again
            pipe = replace(self.pipe, scheduler_config=group.job.scheduler_config)
            group.prepared = pipe.prepare_states(group.job)
            group.weights = weights
        try:
            for request, run, edit in group.prepared:  # in order; skips cancelled ones
                if request is handle.request:
                    if run.control:  # not in the loop, where others would wait for it
                        run.control.load_engines(self.pipe.engines)
                    if run.lora is not None:
                        load_lora_engine(self.pipe.engines)
                    return run, edit
        except Exception as error:
            group.failed = error
            raise
        raise AssertionError("requests of a group are prepared in order")

    def _denoise(self) -> None:
        """Thread: the denoising loop."""

        def candidates() -> list[RequestHandle]:
            return [handle for handle in self._running if handle.state == "running"]

        while ordered := self._next(candidates):
            handles = {id(handle.scheduled): handle for handle in ordered}
            limit = self.estimates.row_limit(len(self._running), self.slots)
            batch = select_batch([handle.scheduled for handle in ordered], limit)
            self._evaluate([handles[id(scheduled)] for scheduled in batch])

    def _evaluate(self, handles: Sequence[RequestHandle]) -> None:
        """Evaluate the model once for a batch."""
        runs = [handle.run for handle in handles if handle.run is not None]
        batch_key, rows = handles[0].scheduled.batch_key, sum(run.num_rows for run in runs)
        control_cost = sum(run.num_rows * run.control_cost for run in runs) / rows
        began = time.monotonic()
        try:
            self._batch_builder.evaluate(self._stages_of(handles[0]).engines, runs)
        except Exception as error:
            for handle in handles:
                self._finish(handle, as_sdrt_error(error))
            if not is_model_callable(self.pipe):
                self._recover()
            return
        seconds = time.monotonic() - began
        costs, is_full = (
            self.cost_model.for_key(batch_key),
            handles[0].scheduled.component == "unet",
        )
        if handles[0].is_in_refiner:
            pass  # the costs are the base's
        elif control_cost:
            costs.observe_control(rows, control_cost, seconds)
        else:
            (costs.observe if is_full else costs.observe_shallow)(rows, seconds)
        if self._observer:
            self._observer.batch_evaluated(rows, seconds)
        for handle, run in zip(handles, runs, strict=True):
            self._after_evaluation(handle, run)

    def _stages_of(self, handle: RequestHandle) -> PipelineStages:
        """Whose engines run the pass that a request is in."""
        if not handle.is_in_refiner:
            return self.pipe
        assert self.pipe.refiner is not None
        return self.pipe.refiner

    def _after_evaluation(self, handle: RequestHandle, run: DenoisingState) -> None:
        """After an evaluation: apply edits, call `on_step`, hand finished latents to the
        decoder.
        """
        try:
            with handle.lease_context():
                if handle.edit:
                    run.replace_latents(handle.edit(run.evaluations_done, run.latents[None])[0])
                if handle.group.on_step:
                    step = build_step(run.table, run.evaluations_done, run.latents[None].copy())
                    handle.group.on_step(handle, handle.job.place_step(step))
        except Exception as error:  # of the caller's callback; the others go on
            self._finish(handle, as_sdrt_error(error))
            return
        handle.scheduled.evaluations_left = run.num_evaluations - run.evaluations_done
        if not run.finished:
            handle.scheduled.num_rows, handle.scheduled.component = run.num_rows, run.component
            return
        with self._changed:
            if handle.scheduled.later_pass:
                handle.scheduled, handle.state = handle.scheduled.start_later_pass(), "upscaling"
            else:
                self._running.remove(handle)
                self._decoding.append(handle)
                handle.state, handle.times.denoised = "decoding", time.monotonic()
            self._changed.notify_all()

    def _decode(self) -> None:
        """Thread: decode latents to images, and enlarge those that go through a second pass."""

        def candidates() -> list[RequestHandle]:
            upscaling = [handle for handle in self._running if handle.state == "upscaling"]
            return [*self._decoding, *upscaling]

        while ordered := self._next(candidates):
            handle = ordered[0]
            assert handle.run is not None
            group = handle.group
            if handle.state == "upscaling":
                self._prepare_later_pass(handle, handle.run)
                continue
            pipe = replace(self.pipe, scheduler_config=group.job.scheduler_config)
            try:
                with handle.lease_context():
                    image = pipe.decode(handle.run.latents[None])[0]
                    text = pipe.parameters_text(handle.request, group.job)
            except Exception as error:
                self._finish(handle, as_sdrt_error(error))
                continue
            handle.times.decoded = time.monotonic()
            self._finish(
                handle, GeneratedImage(annotate_image(image, text), text, handle.request.seed)
            )

    def _prepare_later_pass(self, handle: RequestHandle, run: DenoisingState) -> None:
        """Put a request whose first pass is finished back into the loop."""
        try:
            with handle.lease_context():
                second = self.pipe.prepare_later_state(
                    handle.group.job, handle.request, run.latents
                )
        except Exception as error:
            self._finish(handle, as_sdrt_error(error))
            return
        self._start_pass(handle, *second)

    def _recover(self) -> None:
        """Reload the pipeline until a call of the model succeeds, with growing pauses. Requests
        that were not in the failed call keep their latents and go on.
        """
        with self._changed:
            if self._is_over:
                return
            before, self.state = self.state, "broken"
        pause = 0.1
        while not is_model_callable(self.pipe):
            with self._changed:
                if self._changed.wait_for(lambda: self.state == "closed", timeout=pause):
                    return
            pause = min(2 * pause, MAX_RECOVERY_PAUSE)
            if self._reload:
                try:
                    pipe = self._reload()
                    self._loras.renew(self.pipe, pipe)
                    self.pipe, self._reloaded = pipe, True
                except DeviceLostError as error:
                    self._lose_device(error)
                    return
                except Exception:
                    log.exception("failed to reload the pipeline")
        with self._changed:
            self.state = before
            self._changed.notify_all()


def _required_graph(job: GenerationJob) -> str:
    """The UNet's graph that a job's rows need instead of the plain one; "" for none."""
    if job.lora and job.lora.unet is not None:
        return LORA_PARTS["unet"]
    return CONTROL if uses_control_graph(job) else ""
