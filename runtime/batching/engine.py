"""Pictures in flight: they join and leave between evaluations and share calls of the model.

    with InflightBatcher(sdrt.load("shapes")) as engine:
        tickets = engine.submit("a red circle", {"num_inference_steps": 20, "seed": 0})
        tickets[0].future.result().image.save("circle.png")

Knows pipelines and whose turn it is (`scheduler`); not requests over a network. Pictures need not
agree on timestep, steps, sampler, guidance or seed. Three threads work: one prepares (prompts,
given pictures), one evaluates, one decodes, so that a long decode does not stall the loop.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

from sdrt.runtime.arguments import GenerationKwargs, merge_arguments, parse_options
from sdrt.runtime.denoising import BatchBuilder, DenoisingState, LatentEdit, build_step
from sdrt.runtime.lora.sets import Named, requests_by_set
from sdrt.runtime.lora.switch import LoraSwitch
from sdrt.runtime.parsing import float_parser, int_parser, parse_callable
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.requests import Request
from sdrt.runtime.stages import Prompt

from .cost_model import Costs, costs_of, works
from .request import (
    GeneratedImage,
    Observer,
    OnStep,
    RequestCancelled,
    RequestHandle,
    RequestRejected,
    Submission,
    Times,
    typed,
)
from .scheduler import Turn, forecast, lateness, sharing

log = logging.getLogger(__name__)
MAX_DEADLINE = 86400.0
DEADLINE = float_parser(1e-9, MAX_DEADLINE, f"seconds from now, at most {MAX_DEADLINE:g}")
PRIORITY = int_parser(-100, 100)
LONGEST_PAUSE = 30.0  # seconds between two tries to bring a broken engine back


class InflightBatcher:
    """See the module. A context manager: `start` and `close`."""

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
        kept: Path | None = None,
    ) -> None:
        """slots: pictures that are begun and not finished. waiting: pictures that may wait for one
        rows: of one call of the model at most; None takes what is measured to pay
        deterministic: every call has that many rows, for backends whose sums depend on it
        reload: gives the pipeline anew when its device broke
        kept: where measured costs are kept, such as the bundle's `plans`
        """
        count = int_parser(1, 10_000)
        rows = None if rows is None else count("rows", rows)
        self.pipe = pipe
        self.slots, self.most_waiting = count("slots", slots), count("waiting", waiting)
        self.state: Literal["loading", "ready", "draining", "broken", "closed"] = "loading"
        self.costs: Costs
        self._rows, self._deterministic = rows, deterministic
        self._observer, self._reload, self._kept = observer, reload, kept
        self._changed = threading.Condition()
        self._waiting: list[RequestHandle] = []
        self._inside: list[RequestHandle] = []
        self._decoding: list[RequestHandle] = []
        self._gather = BatchBuilder()
        self._threads: list[threading.Thread] = []
        self._reloaded = False
        self._loras = LoraSwitch(pipe)

    def start(self) -> None:
        """Measure what calls cost, unless that is known, and begin to work."""
        with self.pipe.leases.call():
            self.costs = costs_of(self.pipe, self._rows or 2 * self.slots, self._kept)
        if self._deterministic and self._rows is None:
            self._rows = max(2, *(size.most for size in self.costs.sizes.values()))
        self.rates = self.costs.rates(self._rows)
        self._gather = BatchBuilder(self._rows or 0 if self._deterministic else 0)
        for work in (self._prepare, self._denoise, self._decode):
            name = f"sdrt{work.__name__}"
            thread = threading.Thread(target=self._work, args=(work,), name=name, daemon=True)
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
        """One ticket for every picture of the call, all accepted or none.

        options, arguments: the fields of `GenerationOptions`, as a mapping or by name
        scheduler: as for `Pipeline.with_scheduler`
        priority: -100 to 100, larger goes first. deadline: seconds from now
        on_step: called after each evaluation, in the engine's thread: it must be quick
        loras: LoRA files by name (a `str`, in the folder `loras`) or path (a `Path`), with their
            weights, beside those that tags in the prompts name
        Raises UsageError for what does not fit, RequestRejected for what cannot be done in time.
        """
        if deadline is not None:
            deadline = DEADLINE("deadline", deadline)
        priority = PRIORITY("priority", priority)
        if on_step is not None:
            parse_callable("on_step", on_step)
        chosen = parse_options(merge_arguments(options, arguments))
        self._check_open()
        pipe = self.pipe
        if scheduler is not None and not (isinstance(scheduler, str) and not scheduler):
            pipe = pipe.with_scheduler(scheduler)
        job = pipe.create_job(prompt, chosen)
        table = job.table
        now = time.monotonic()

        def ticket(request: Request, submission: Submission) -> RequestHandle:
            turn = Turn(
                (job.size, submission.loras), job.num_rows, table.evaluations, now, now, priority
            )
            turn.promised, turn.full = deadline is not None, table.full_fraction
            turn.due = self.rates.due(turn) if deadline is None else now + deadline
            return RequestHandle(
                request, table.evaluations, Times(now), turn, submission, self._cancel
            )

        tickets = []
        for own, part in requests_by_set(job.requests, chosen, self._loras.base, loras).items():
            submission = Submission(replace(job, requests=part), on_step, own)
            tickets += [ticket(request, submission) for request in part]
        tickets.sort(key=lambda each: each.request.index)
        with self._changed:
            try:
                self._admit(tickets, now)
            except RequestRejected as refused:
                if self._observer:
                    self._observer.refused(refused.cause)
                raise
            self._waiting += tickets
            self._changed.notify_all()
        return tickets

    def _check_open(self) -> None:
        if self.state == "broken":
            raise RequestRejected("broken", "device error; the engine is restarting", LONGEST_PAUSE)
        if self.state != "ready":
            raise RequestRejected("draining", f"the engine is {self.state}", LONGEST_PAUSE)

    def _admit(self, tickets: Sequence[RequestHandle], now: float) -> None:
        """Raise RequestRejected unless all of them can be accepted and every promise be kept."""
        self._check_open()
        turn = tickets[0].turn
        if missing := self.costs.missing_bytes(turn.group[0], turn.rows):  # type: ignore[index]
            raise RequestRejected(
                "memory", f"not enough memory: {missing / 1e6:.0f} MB missing", 10.0
            )
        others = [other.turn for other in (*self._inside, *self._waiting)]
        if len(self._waiting) + len(tickets) > self.most_waiting:
            done = forecast(others, now, self.rates, self.slots)
            raise RequestRejected(
                "queue",
                f"the queue is full: {len(self._waiting)} of {self.most_waiting} images waiting",
                min(done, default=now) - now,
            )
        turns = [*others, *(ticket.turn for ticket in tickets)]
        if not any(turn.promised for turn in turns):
            return
        late = lateness(turns, now, self.rates, self.slots)
        if turn.promised and (new := max(late[len(others) :])) > 0.0:
            raise RequestRejected(
                "deadline", f"the deadline cannot be met: estimated {new:.2g} s late", new
            )
        if any(other.promised and by > 0.0 for other, by in zip(others, late, strict=False)):
            then = lateness(others, now, self.rates, self.slots)
            for other, by, before in zip(others, late, then, strict=False):
                if other.promised and before <= 0.0 < by:
                    message = "accepting this request would miss the deadline of an earlier one"
                    raise RequestRejected("deadline", message, other.due - now)

    def tickets(self) -> list[RequestHandle]:
        """Those that are not finished, in the order of their turns."""
        now = time.monotonic()
        with self._changed:
            ahead = [*self._decoding, *sorted(self._inside, key=lambda t: t.turn.key(now))]
            return [*ahead, *sorted(self._waiting, key=lambda t: t.turn.key(now))]

    def drain(self, seconds: float) -> bool:
        """Refuse what is new and wait for the rest; whether all were finished in time."""
        with self._changed:
            if self.state == "ready":
                self.state = "draining"
            return self._changed.wait_for(lambda: not self._unfinished(), timeout=seconds)

    def close(self) -> None:
        """End the threads; what is unfinished is cancelled. The pipeline stays the caller's."""
        with self._changed:
            self.state = "closed"
            self._changed.notify_all()
        for thread in self._threads[1:]:
            thread.join()
        for ticket in self._unfinished():  # the first may wait for a change that waits for these
            ticket.let_go()
        for thread in self._threads[:1]:
            thread.join()
        for ticket in self._unfinished():
            self._end(ticket, RequestCancelled("the engine was closed"))
        if self._reloaded:
            self.pipe.close()

    def __enter__(self) -> "InflightBatcher":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unfinished(self) -> list[RequestHandle]:
        return [*self._waiting, *self._inside, *self._decoding]

    def _cancel(self, ticket: RequestHandle) -> None:
        with self._changed:
            ticket.unwanted = True
            if ticket.state == "waiting":
                self._end(ticket, RequestCancelled("cancelled"))
            self._changed.notify_all()

    def _end(self, ticket: RequestHandle, result: GeneratedImage | Exception) -> None:
        """The picture, or what went wrong, for whoever waits."""
        with self._changed:
            for place in (self._waiting, self._inside, self._decoding):
                if ticket in place:
                    place.remove(ticket)
            ticket.run = ticket.edit = None
            ticket.let_go()
            if isinstance(result, GeneratedImage):
                ticket.state = "done"
            else:
                ticket.state = "cancelled" if isinstance(result, RequestCancelled) else "failed"
            self._changed.notify_all()
        if self._observer:
            self._observer.finished(ticket)
        if isinstance(result, GeneratedImage):
            ticket.future.set_result(result)
        else:
            ticket.future.set_exception(result)

    def _next(self, tickets: Callable[[], list[RequestHandle]]) -> list[RequestHandle]:
        """Wait until there are some, and give them in the order of their turns; none at the end.
        The unwanted among them are cancelled.
        """
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self.state == "closed" or (self.state != "broken" and tickets())
                )
                found = [] if self.state == "closed" else list(tickets())
                unwanted = [ticket for ticket in found if ticket.unwanted]
            for ticket in unwanted:  # one that is cancelled from here on takes part once more
                self._end(ticket, RequestCancelled("cancelled"))
            if len(unwanted) < len(found) or not found:
                now = time.monotonic()
                wanted = (ticket for ticket in found if ticket not in unwanted)
                return sorted(wanted, key=lambda ticket: ticket.turn.key(now))

    def _work(self, work: Callable[[], None]) -> None:
        """A thread's whole life. A mistake of this module ends the engine for all to see."""
        try:
            work()
        except Exception as error:
            log.exception("the engine in flight ends")
            self.state = "closed"
            for ticket in self._unfinished():
                self._end(ticket, typed(error))

    def _prepare(self) -> None:
        """A thread: whoever gets a slot is encoded."""

        def candidates() -> list[RequestHandle]:
            begun = len(self._inside) + len(self._decoding)
            if begun >= self.slots:
                return []
            return self._loras.eligible(self.pipe, self._waiting, begun > 0)

        while ordered := self._next(candidates):
            ticket = ordered[0]
            with self._changed:
                if ticket.state != "waiting":
                    continue
                self._waiting.remove(ticket)
                self._inside.append(ticket)
                ticket.state, ticket.turn.started = "preparing", True
            ticket.times.began = time.monotonic()
            try:
                ticket.lease = self._loras.begin(self.pipe, ticket)
                with ticket.lease.held():
                    if ticket.submission.job.options.returns_image:
                        self._return_image(ticket)
                        continue
                    run, edit = self._prepared(ticket)
            except Exception as error:
                self._end(ticket, typed(error))
                continue
            shapes = tuple((name, value.shape[1:]) for name, value in run.conditioning.items())
            with self._changed:
                ticket.turn.group = (*ticket.turn.group[:2], shapes)  # type: ignore[index]
                ticket.turn.network = run.component
                ticket.run, ticket.edit, ticket.state = run, edit, "running"
                ticket.times.prepared = time.monotonic()
                self._changed.notify_all()

    def _return_image(self, ticket: RequestHandle) -> None:
        """At strength 0 there is nothing to evaluate: the image to start from is the result."""
        job = ticket.submission.job
        try:
            image = self.pipe.input_image(job)
            text = self.pipe.parameters_text(ticket.request, job)
        except Exception as error:
            self._end(ticket, typed(error))
            return
        ticket.times.prepared = ticket.times.denoised = ticket.times.decoded = time.monotonic()
        self._end(ticket, GeneratedImage(image, text, ticket.request.seed))

    def _prepared(self, ticket: RequestHandle) -> tuple[DenoisingState, LatentEdit | None]:
        shared = ticket.submission
        if shared.failed:
            raise shared.failed
        weights = self.pipe.leases, self.pipe.leases.changes
        if shared.prepared is None or shared.weights != weights:  # its texts are read anew
            pipe = replace(self.pipe, scheduler_config=shared.job.scheduler_config)
            shared.prepared = pipe.prepare_states(shared.job)
            shared.weights = weights
        try:
            for request, run, edit in shared.prepared:  # in order, past the cancelled ones
                if request is ticket.request:
                    return run, edit
        except Exception as error:
            shared.failed = error
            raise
        raise AssertionError("tickets of a submission are prepared in order")

    def _denoise(self) -> None:
        """A thread: the loop."""

        def candidates() -> list[RequestHandle]:
            return [ticket for ticket in self._inside if ticket.state == "running"]

        while ordered := self._next(candidates):
            turns = {id(ticket.turn): ticket for ticket in ordered}
            chosen = sharing([ticket.turn for ticket in ordered], self.rates.most)
            self._evaluate([turns[id(turn)] for turn in chosen])

    def _evaluate(self, tickets: Sequence[RequestHandle]) -> None:
        """One call of the model for all of these."""
        runs = [ticket.run for ticket in tickets if ticket.run is not None]
        group, rows = tickets[0].turn.group, sum(run.num_rows for run in runs)
        began = time.monotonic()
        try:
            self._gather.evaluate(self.pipe.engines, runs)
        except Exception as error:
            for ticket in tickets:
                self._end(ticket, typed(error))
            if not works(self.pipe):
                self._recover()
            return
        seconds = time.monotonic() - began
        costs, whole = self.costs.of(group), tickets[0].turn.network == "unet"
        (costs.observe if whole else costs.observe_shallow)(rows, seconds)
        if self._observer:
            self._observer.called(rows, seconds)
        for ticket, run in zip(tickets, runs, strict=True):
            self._stepped(ticket, run)

    def _stepped(self, ticket: RequestHandle, run: DenoisingState) -> None:
        """After an evaluation: edits, news, and the way to the decoder."""
        try:
            with ticket.held():
                if ticket.edit:
                    run.replace_latents(ticket.edit(run.evaluations_done, run.latents[None])[0])
                if ticket.submission.on_step:
                    step = build_step(run.table, run.evaluations_done, run.latents[None].copy())
                    ticket.submission.on_step(ticket, step)
        except Exception as error:  # of the caller's; it touches nobody else
            self._end(ticket, typed(error))
            return
        ticket.turn.left = run.num_evaluations - run.evaluations_done
        if not run.finished:
            ticket.turn.rows, ticket.turn.network = run.num_rows, run.component
            return
        with self._changed:
            self._inside.remove(ticket)
            self._decoding.append(ticket)
            ticket.state, ticket.times.denoised = "decoding", time.monotonic()
            self._changed.notify_all()

    def _decode(self) -> None:
        """A thread: latents to pictures."""
        while ordered := self._next(lambda: self._decoding):
            ticket = ordered[0]
            assert ticket.run is not None
            shared = ticket.submission
            pipe = replace(self.pipe, scheduler_config=shared.job.scheduler_config)
            try:
                with ticket.held():
                    image = pipe.decode(ticket.run.latents[None])[0]
                    text = pipe.parameters_text(ticket.request, shared.job)
            except Exception as error:
                self._end(ticket, typed(error))
                continue
            ticket.times.decoded = time.monotonic()
            self._end(ticket, GeneratedImage(image, text, ticket.request.seed))

    def _recover(self) -> None:
        """Until the model can be called again: try, load anew, wait longer every time. Pictures
        that were not in the failed call keep their latents and go on.
        """
        with self._changed:
            if self.state == "closed":
                return
            before, self.state = self.state, "broken"
        pause = 0.1
        while not works(self.pipe):
            with self._changed:
                if self._changed.wait_for(lambda: self.state == "closed", timeout=pause):
                    return
            pause = min(2 * pause, LONGEST_PAUSE)
            if self._reload:
                try:
                    pipe = self._reload()
                    self._loras.renew(self.pipe, pipe)
                    self.pipe, self._reloaded = pipe, True
                except Exception:
                    log.exception("the pipeline cannot be loaded anew")
        with self._changed:
            self.state = before
            self._changed.notify_all()
