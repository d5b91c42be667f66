"""The ways to serve requests that `serve_load.py` compares, the requests, and the clocks.

In flight: sdrt's. By whole batches: the same engines; whoever waits is batched with others of its
size, the batch runs to its longest one's end, and then all of it is decoded. One by one: diffusers.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from serve_sim import Request

from sdrt.runtime import Pipeline
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.batching.request import RequestRejected
from sdrt.runtime.denoising import BatchBuilder
from sdrt.runtime.lora.tags import LoraWeight

PROMPT = "a red circle on a blue background"
SIZES = ((64, 64), (96, 96))
STEPS = (4, 8, 20, 30, 50)
SAMPLERS = ("Euler", "DPM++ 2M Karras", "UniPC")
WAIT = 0.05  # seconds that a batch waits to be filled
MIX = ("", "", "lora", "lora", "control")  # alike likely


@dataclass(slots=True, eq=False)
class Job(Request):
    """A request with all that it asks for.

    graph: "lora" with one of the LoRA files, "control" with a ControlNet, else ""
    first: when its first preview could be drawn
    """

    steps: int = 0
    sampler: str = ""
    size: tuple[int, int] = (64, 64)
    seed: int = 0
    graph: str = ""
    lora: Path | None = None
    first: float = math.nan
    refused: bool = False

    @property
    def options(self) -> dict[str, Any]:
        width, height = self.size
        control = {"control_image": outline(self.size)} if self.graph == "control" else {}
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": 7.5 if self.rows == 2 else 1.0,
            "size": f"{width}x{height}",
            "seed": self.seed,
            **control,
        }

    @property
    def loras(self) -> dict[Path, float]:
        return {self.lora: 1.0} if self.lora else {}


@cache
def outline(size: tuple[int, int]) -> Image.Image:
    edges = Image.new("L", size)
    ImageDraw.Draw(edges).ellipse((6, 6, size[0] // 2, size[1] // 2), outline=255)
    return edges


def random_job(rng: np.random.Generator, loras: Sequence[Path] = ()) -> Job:
    steps, size = int(rng.choice(STEPS)), SIZES[int(rng.integers(2))]
    rows, seed = int(rng.integers(1, 3)), int(rng.integers(2**31))
    sampler = str(rng.choice(SAMPLERS))
    job = Job(0.0, steps, rows, (size,), steps=steps, sampler=sampler, size=size, seed=seed)
    if loras:
        job.graph, file = str(rng.choice(MIX)), loras[int(rng.integers(len(loras)))]
        job.lora = file if job.graph == "lora" else None
    return job


def fresh(jobs: Sequence[Job]) -> list[Job]:
    return [replace(job, done=math.nan, first=math.nan, refused=False) for job in jobs]


class Clock:
    """Seconds that this process had its core, and those that were skipped."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def now(self) -> float:
        return self.skipped + time.process_time()

    def skip_until(self, second: float) -> None:
        """For when there is nothing to do before."""
        self.skipped += max(0.0, second - self.now())


class WallClock(Clock):
    def now(self) -> float:
        return time.monotonic()

    def skip_until(self, second: float) -> None:
        time.sleep(max(0.0, second - self.now()))


def in_flight(jobs: Sequence[Job], engine: InflightBatcher, clock: Clock) -> float:
    """Returns the processor seconds of submitting."""
    unfinished: set[int] = set()
    changed = threading.Event()
    began, submitting = clock.now(), 0.0

    def send(job: Job) -> None:
        def stepped(_: object, step: object) -> None:
            if math.isnan(job.first):
                job.first = clock.now() - began

        def done(_: object) -> None:
            job.done = clock.now() - began
            unfinished.discard(id(job))
            changed.set()

        try:
            (handle,) = engine.submit(
                PROMPT, job.options, scheduler=job.sampler, on_step=stepped, loras=job.loras
            )
        except RequestRejected:
            job.refused = True
        else:
            unfinished.add(id(job))
            handle.future.add_done_callback(done)

    for job in jobs:
        while (rest := began + job.at - clock.now()) > 0.0:
            changed.clear()
            if unfinished:
                changed.wait(max(rest, 0.001))  # the clock is never faster than the wall's
            else:
                clock.skip_until(began + job.at)
        before = time.thread_time()
        send(job)
        submitting += time.thread_time() - before
    while unfinished:
        changed.clear()
        changed.wait(1.0)
    return submitting


def by_batches(
    jobs: Sequence[Job], pipe: Pipeline, clock: Clock, max_batch: int, by_file: bool = False
) -> None:
    """Serve whole batches. by_file: with LoRA files in the weights, one for a batch"""
    began, coming, queue = clock.now(), list(jobs), []

    def collect() -> None:
        while coming and began + coming[0].at <= clock.now():
            queue.append(coming.pop(0))

    while coming or queue:
        if not queue:
            clock.skip_until(began + coming[0].at)
        collect()
        if len(queue) < max_batch:
            clock.skip_until(clock.now() + WAIT)
            collect()
        batch = alike(queue, by_file)[:max_batch]
        queue = [job for job in queue if job not in batch]
        run_batch(pipe, batch, by_file, lambda: clock.now() - began)
    if by_file:
        pipe.set_lora({})


def alike(queue: Sequence[Job], by_file: bool) -> list[Job]:
    """The first and those that may share its calls: one size, one graph next to the plain one."""
    first, graph, batch = queue[0], "", []
    for job in queue:
        same = job.size == first.size and (job.lora == first.lora or not by_file)
        if same and (not graph or job.graph in ("", graph)):
            batch.append(job)
            graph = graph or job.graph
    return batch


def run_batch(
    pipe: Pipeline, batch: Sequence[Job], by_file: bool, clock: Callable[[], float]
) -> None:
    if by_file and {path for path, _ in pipe.adapters.chosen} != set(batch[0].loras):
        pipe.set_lora(batch[0].loras)
    runs = []
    for job in batch:
        own, options = pipe.with_scheduler(job.sampler), parse_options(job.options)
        job_images = own.create_job(PROMPT, options)
        if job.lora and not by_file:
            assert pipe.lora_rows is not None
            job_images = job_images.with_lora(pipe.lora_rows.pack(((job.lora, LoraWeight()),)))
        runs += [run for _, run, _ in own.prepare_states(job_images)]
    gather = BatchBuilder()
    while going := [run for run in runs if not run.finished]:
        gather.evaluate(pipe.engines, going)
        for job in batch:
            job.first = clock() if math.isnan(job.first) else job.first
    for run in runs:
        pipe.decode(run.latents[None])
    for job in batch:
        job.done = clock()


def one_by_one(jobs: Sequence[Job], reference: Any, clock: Clock) -> None:
    """diffusers' pipeline, first come, first served."""
    import diffusers
    import torch

    kinds = {
        "Euler": ("EulerDiscreteScheduler", {}),
        "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        "UniPC": ("UniPCMultistepScheduler", {}),
    }
    config = reference.scheduler.config
    began = clock.now()
    for job in jobs:
        clock.skip_until(began + job.at)
        name, options = kinds[job.sampler]
        reference.scheduler = getattr(diffusers, name).from_config(config, **options)

        def stepped(_: object, step: int, timestep: object, cached: dict, job: Job = job) -> dict:
            if step == 0:
                job.first = clock.now() - began
            return cached

        reference(
            PROMPT,
            num_inference_steps=job.steps,
            guidance_scale=job.options["guidance_scale"],
            width=job.size[0],
            height=job.size[1],
            generator=torch.Generator().manual_seed(job.seed),
            callback_on_step_end=stepped,
        )
        job.done = clock.now() - began
