"""Which LoRA files the in-flight batcher applies, and when it switches to others.

- All requests in flight at the same time use one set: that of the first in order.
- When the first waiting request needs another set, no more of the current one are started, except
  those that waited when the batcher switched to it; so sets that alternate share calls of the model
  and nothing starves.
- Files that can be factors of a request's own rows (`rows.py`) change no weights, so such requests
  are in flight with others.
- Without a batcher, `stream_by_lora_set` generates the images of one set after those of another.

Knows request handles and the pipeline; not how images are generated.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from PIL.Image import Image

from sdrt.errors import BackendError, BundleError, CheckpointError, SdrtError, UsageError
from sdrt.runtime.batching.request import RequestHandle
from sdrt.runtime.denoising import Step
from sdrt.runtime.job import GenerationJob, uses_control_graph
from sdrt.runtime.leases import Lease
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.requests import Request

from .names import find_lora_by_name
from .rows import LoraFactors, RowMisfit
from .sets import LoraSet, check_lora_set, format_tags, group_by_lora_set, merge_loras
from .tags import parse_tags

log = logging.getLogger(__name__)


class LoraSwitch:
    """The sets of one engine. base: what the pipeline carries for those that name no files."""

    def __init__(self, pipe: Pipeline) -> None:
        self.base: LoraSet = pipe.adapters.chosen
        self._carried: LoraSet = self.base  # by this engine's own doing
        self._changed_at = 0.0
        self._changing = threading.Lock()

    def find_factors(
        self, pipe: Pipeline, job: GenerationJob, files: LoraSet
    ) -> LoraFactors | None:
        """The factors of the rows of a job that is made with these files, in addition to the base;
        None where they are to change the weights instead.
        """
        if not files or pipe.lora_rows is None or not pipe.lora_rows.is_available:
            return None
        try:
            factors = pipe.lora_rows.pack(files)
            _check_combination(job, factors)
        except RowMisfit as error:
            log.debug("%s: in a batch of its own: %s", format_tags(files).strip(), error)
            return None
        return factors

    def eligible(
        self, pipe: Pipeline, waiting: Sequence[RequestHandle], busy: bool
    ) -> list[RequestHandle]:
        """Those of the waiting handles that may begin now. busy: whether others are unfinished."""
        if not waiting:
            return []
        now = time.monotonic()
        first = min(waiting, key=lambda handle: handle.scheduled.sort_key(now))
        carried, requested = pipe.adapters.chosen, self._requested_set(pipe, first)
        same = [handle for handle in waiting if self._requested_set(pipe, handle) == carried]
        if pipe.adapters.is_outdated:
            same = []
        elif requested == carried:
            return same
        priority = first.scheduled.sort_key(now)[0]
        early = [
            handle
            for handle in same
            if handle.times.submitted <= self._changed_at
            and handle.scheduled.sort_key(now)[0] <= priority
        ]
        return early or ([] if busy and not first.group.failed else [first])

    def begin(self, pipe: Pipeline, handle: RequestHandle) -> Lease:
        """A lease of the pipeline while it carries the handle's set, which it is made to carry
        where it does not; nothing that was begun with another may be unfinished. Raises UsageError
        for files that do not fit and a backend that takes none; the other handles of the submission
        fail with it.
        """
        if handle.group.failed:
            raise handle.group.failed
        while True:
            requested = self._requested_set(pipe, handle)
            if pipe.adapters.chosen != requested or pipe.adapters.is_outdated:
                try:
                    self._change(pipe, requested)
                except UsageError as error:
                    handle.group.failed = error
                    raise
            lease = pipe.leases.acquire()
            if pipe.adapters.chosen == requested:
                return lease
            lease.release()  # somebody else changed it in between

    def renew(self, broken: Pipeline, pipe: Pipeline) -> None:
        """Let a pipeline that was reloaded carry what the broken one did."""
        pipe.embeddings.adopt(broken.embeddings)
        with self._changing:
            carried = broken.adapters.chosen
            if pipe.adapters.chosen != carried:
                pipe.set_lora(dict(carried))

    def _requested_set(self, pipe: Pipeline, handle: RequestHandle) -> LoraSet:
        """The base is what others made the pipeline carry last."""
        if pipe.adapters.chosen != self._carried:
            self.base = self._carried = pipe.adapters.chosen
        loras = handle.group.loras
        return self.base if loras is None else loras

    def _change(self, pipe: Pipeline, requested: LoraSet) -> None:
        began = time.monotonic()
        with self._changing:
            try:
                pipe.set_lora(dict(requested))
            except (CheckpointError, BundleError, BackendError) as error:
                raise UsageError(str(error)) from error
            finally:
                self._carried = pipe.adapters.chosen
        self._changed_at = began


def _check_combination(job: GenerationJob, factors: LoraFactors) -> None:
    """Raise RowMisfit for a job that needs another graph too."""
    if job.options.feature_reuse > 1:
        raise RowMisfit("features are reused")
    if uses_control_graph(job):
        raise RowMisfit("it has a ControlNet, a T2I-Adapter or an image prompt")
    if factors.changes_text and job.embeddings.find_used(_list_texts(job)):
        raise RowMisfit("its prompt has words of textual inversion")


def _list_texts(job: GenerationJob) -> Iterator[str]:
    """All texts that are encoded for a job."""
    timelines = [job.get_timeline(request) for request in job.requests]
    if job.hires:
        timelines += [job.hires.get_timeline(request) for request in job.requests]
    for timeline in timelines:
        yield from (*chain(*timeline.prompts), *timeline.negative)


def stream_by_lora_set(
    pipe: Pipeline, job: GenerationJob, on_step: Callable[[Step], None] | None = None
) -> Iterator[tuple[Request, Image]]:
    """The images of a job whose prompts may have LoRA tags, which add to what the pipeline
    carries; afterwards it carries the files of the last. Nobody else may use it meanwhile.

    Yields:
        Each request as it is made, with its text in `recorded_prompt`, and its image.

    Raises:
        UsageError: For a tag that is not understood or a name that is unknown, before the first.
        SdrtError: After all others, for an image that holds no numbers.
    """
    base, failed = pipe.adapters.chosen, None
    for loras, part in group_by_lora_set(job.requests, job.options, base).items():
        carried = merge_loras(base, loras or ())
        if carried != pipe.adapters.chosen:
            pipe.set_lora(dict(carried))
        if loras is None and job.options.weighting:
            part = [
                replace(request, recorded_prompt=request.prompt + format_tags(base))
                for request in part
            ]
        try:
            yield from pipe.stream_job(replace(job, requests=part), on_step)
        except SdrtError as error:
            failed = failed or error
    if failed:
        raise failed


def apply_tags(pipe: Pipeline, prompt: str) -> str:
    """Let the pipeline carry the LoRA files of a prompt's tags too; the prompt without them."""
    text, tags = parse_tags(prompt)
    if tags:
        own = [(find_lora_by_name(tag.name), tag.weight) for tag in tags]
        pipe.set_lora(dict(check_lora_set(merge_loras(pipe.adapters.chosen, own))))
    return text
