"""Requests as they come, served three ways in one run: in flight, by whole batches, and by a loop
over diffusers.

    python benchmarks/serve_load.py [--requests 150] [--loads 0.3,0.6,0.9] [--save]

Poisson arrivals, the same for all three: 4 to 50 steps, guided and not, three samplers, two sizes,
on the embedded model. The capacity is what the engine in flight makes when it is never idle. By
whole batches: the same engines; whoever waits is batched with others of its size, the batch runs to
its longest one's end, and then all of it is decoded. That is kinder than servers that batch only
requests of equal steps, sampler and guidance. The simulation of `serve_sim.py` runs the same
arrivals on what the calls of the run in flight took.
"""

import argparse
import math
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from published import reference_pipeline
from results import save
from serve_sim import Request, poisson, simulated

import sdrt
from sdrt.engine import Engine, Feeds
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import embedded_checkpoint
from sdrt.runtime import Pipeline
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.batching.request import RequestRejected
from sdrt.runtime.batching.scheduler import CostEstimates
from sdrt.runtime.denoising import BatchBuilder

PROMPT = "a red circle on a blue background"
SIZES = ((64, 64), (96, 96))
STEPS = (4, 8, 20, 30, 50)
SAMPLERS = ("Euler", "DPM++ 2M Karras", "UniPC")
SHORT = 8  # steps of what is called short
WAIT = 0.05  # seconds that a batch waits to be filled
WAYS = ("in flight", "in static batches", "diffusers, one by one")


@dataclass(slots=True, eq=False)
class Job(Request):
    """A request with all that it asks for; `first` is when its first preview could be drawn."""

    steps: int = 0
    sampler: str = ""
    size: tuple[int, int] = (64, 64)
    seed: int = 0
    first: float = math.nan
    refused: bool = False

    @property
    def options(self) -> dict[str, Any]:
        width, height = self.size
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": 7.5 if self.rows == 2 else 1.0,
            "size": f"{width}x{height}",
            "seed": self.seed,
        }


def random_job(rng: np.random.Generator) -> Job:
    steps, size = int(rng.choice(STEPS)), SIZES[int(rng.integers(2))]
    rows, seed = int(rng.integers(1, 3)), int(rng.integers(2**31))
    sampler = str(rng.choice(SAMPLERS))
    return Job(0.0, steps, rows, (size,), steps=steps, sampler=sampler, size=size, seed=seed)


class Timed:
    """An engine that keeps what its calls took: seconds by the size of its input and its rows."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.seconds: dict[tuple[Any, int], list[float]] = {}

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        result = self.engine(feeds)
        shape = next(iter(feeds.values())).shape
        self.seconds.setdefault((shape[-1], shape[0]), []).append(time.perf_counter() - began)
        return result

    def refit(self, weights: Feeds) -> None:
        self.engine.refit(weights)

    def close(self) -> None:
        self.engine.close()

    def mean(self, side: int, rows: int) -> float:
        """Of calls of this side and so many rows; between and beyond those seen, by a line."""
        seen = {r: float(np.mean(v)) for (s, r), v in self.seconds.items() if s == side}
        slope, start = np.polyfit(list(seen), list(seen.values()), 1) if len(seen) > 1 else (0, 0)
        return seen.get(rows) or float(max(start + slope * rows, min(seen.values())))


def rates_of(pipe: Pipeline, rates: CostEstimates) -> CostEstimates:
    """What the calls of a run really took, in place of what was expected of them."""
    unet, decoder = pipe.engines["unet"], pipe.engines["vae_decoder"]
    assert isinstance(unet, Timed) and isinstance(decoder, Timed)

    def side(group: Any) -> int:
        return int(group[0][0] // pipe.manifest.downscale)

    return replace(
        rates,
        call_seconds=cache(lambda group, rows: unet.mean(side(group), rows)),
        decode_seconds=cache(lambda group: decoder.mean(side(group), 1)),
    )


def played(jobs: Sequence[Job], send: Callable[[Job], None]) -> float:
    """Send every job at its second; gives when that began."""
    began = time.perf_counter()
    for job in jobs:
        time.sleep(max(0.0, began + job.at - time.perf_counter()))
        send(job)
    return began


def in_flight(jobs: Sequence[Job], engine: InflightBatcher) -> None:
    left = threading.Semaphore(0)
    began = time.perf_counter()

    def send(job: Job) -> None:
        def stepped(_: object, step: object) -> None:
            if math.isnan(job.first):
                job.first = time.perf_counter() - began

        def done(_: object) -> None:
            job.done = time.perf_counter() - began
            left.release()

        try:
            (handle,) = engine.submit(PROMPT, job.options, scheduler=job.sampler, on_step=stepped)
        except RequestRejected:
            job.refused = True
            left.release()
        else:
            handle.future.add_done_callback(done)

    began = played(jobs, send)
    for _ in jobs:
        left.acquire()


def by_batches(pipe: Pipeline, jobs: Sequence[Job], max_batch: int) -> None:
    """One worker; see the module."""
    queue: list[Job] = []
    changed = threading.Condition()
    began = time.perf_counter()

    def send(job: Job) -> None:
        with changed:
            queue.append(job)
            changed.notify()

    def work() -> None:
        for _ in range(len(jobs)):
            if all(not math.isnan(job.done) for job in jobs):
                return
            with changed:
                changed.wait_for(lambda: queue)
            time.sleep(WAIT if len(queue) < max_batch else 0.0)
            with changed:
                batch = [job for job in queue if job.size == queue[0].size][:max_batch]
                for job in batch:
                    queue.remove(job)
            run_batch(pipe, batch, lambda: time.perf_counter() - began)

    worker = threading.Thread(target=work)
    worker.start()
    began = played(jobs, send)
    worker.join()


def run_batch(pipe: Pipeline, batch: Sequence[Job], clock: Callable[[], float]) -> None:
    runs = []
    for job in batch:
        own, options = pipe.with_scheduler(job.sampler), parse_options(job.options)
        job_images = own.create_job(PROMPT, options)
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


def one_by_one(reference: Any, jobs: Sequence[Job]) -> None:
    """diffusers' pipeline, first come, first served."""
    import diffusers
    import torch

    kinds = {
        "Euler": ("EulerDiscreteScheduler", {}),
        "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        "UniPC": ("UniPCMultistepScheduler", {}),
    }
    config = reference.scheduler.config
    began = time.perf_counter()
    for job in jobs:
        time.sleep(max(0.0, began + job.at - time.perf_counter()))
        name, options = kinds[job.sampler]
        reference.scheduler = getattr(diffusers, name).from_config(config, **options)

        def stepped(_: object, step: int, timestep: object, cached: dict, job: Job = job) -> dict:
            if step == 0:
                job.first = time.perf_counter() - began
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
        job.done = time.perf_counter() - began


def figures_of(jobs: Sequence[Job], alone: Callable[[Job], float]) -> dict[str, float]:
    """alone: seconds that a job takes if nothing else runs."""
    cached = [job for job in jobs if not job.refused]
    every = np.array([job.done - job.at for job in cached])
    short = [job.done - job.at for job in cached if job.steps <= SHORT]
    slowed = every / np.array([alone(job) for job in cached])
    values = {
        "images_per_second": len(cached) / max(job.done for job in cached),
        **{f"p{q}": float(np.percentile(every, q)) for q in (50, 95, 99)},
        "short_p95": float(np.percentile(short, 95)),
        "first_step_p50": float(np.nanmedian([job.first - job.at for job in cached])),
        "refused": sum(job.refused for job in jobs),
        # Jain 1984: 1 where all are slowed down alike
        "fairness": float(slowed.sum() ** 2 / (len(slowed) * (slowed**2).sum())),
    }
    return {name: round(value, 4) for name, value in values.items()}


def fresh(jobs: Sequence[Job]) -> list[Job]:
    return [replace(job, done=math.nan, first=math.nan, refused=False) for job in jobs]


def measured(pipe: Pipeline, args: argparse.Namespace) -> dict[str, Any]:
    with InflightBatcher(pipe, waiting=10_000) as engine:
        rates = engine.estimates
        max_batch = max(size.max_rows for size in engine.cost_model.sizes.values())

        def alone(job: Job) -> float:
            group = (job.size,)
            return (
                rates.prepare_seconds(group)
                + job.steps * rates.call_seconds(group, job.rows)
                + rates.decode_seconds(group)
            )

        burst = poisson(args.requests, 1e6, random_job, 7)
        in_flight(burst, engine)
        capacity = len(burst) / max(job.done for job in burst)
        reference = reference_pipeline(embedded_checkpoint("shapes"), "float32")
        ways = (
            lambda jobs: in_flight(jobs, engine),
            lambda jobs: by_batches(pipe, jobs, args.batch),
            lambda jobs: one_by_one(reference, jobs),
        )
        batches = fresh(burst)
        by_batches(pipe, batches, args.batch)
        actual: dict[str, Any] = {
            "rows_of_a_call": max_batch,
            "capacity": round(capacity, 3),
            "capacity_by_batches": round(len(burst) / max(job.done for job in batches), 3),
        }
        print(actual)
        for load in args.loads:
            arrivals = poisson(args.requests, load * capacity, random_job, 11)
            rows = actual[f"{load:.0%}"] = {}
            for timed in (pipe.engines["unet"], pipe.engines["vae_decoder"]):
                timed.seconds.clear()
            for name, way in zip(WAYS, ways, strict=True):
                jobs = fresh(arrivals)
                way(jobs)
                rows[name] = figures_of(jobs, alone)
                show(load, name, rows[name])
                if name == WAYS[0]:  # on what the calls of this very run took
                    jobs = fresh(arrivals)
                    simulated(jobs, rates_of(pipe, engine.estimates), 1, engine.slots)
                    for job in jobs:
                        job.first = job.begun
                    rows["simulated"] = figures_of(jobs, alone)
                    show(load, "simulated", rows["simulated"])
    return actual


def show(load: float, name: str, row: dict[str, float]) -> None:
    print(f"{load:4.0%}  {name:30}", "  ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument(
        "--loads", type=lambda t: [float(p) for p in t.split(",")], default="0.3,0.6,0.9"
    )
    parser.add_argument("--batch", type=int, default=8, help="images of a static batch")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = BuildPlan("shapes", output=Path(folder) / "shapes", sizes=SIZES)
        with sdrt.load(build_bundle(plan), backend="onnxruntime") as loaded:
            timed = {name: Timed(loaded.engines[name]) for name in ("unet", "vae_decoder")}
            actual = measured(replace(loaded, engines={**loaded.engines, **timed}), args)
    if args.save:
        save("serve_load", claims_from(actual), actual)


def claims_from(actual: dict[str, Any]) -> dict[str, str]:
    ours, batches, reference = (actual["60%"][way] for way in WAYS)
    simulated_row = actual["60%"]["simulated"]
    return {
        "served at 60 % load, 95 % of requests of up to 8 steps": (
            f"{ours['short_p95']:.2f} s in flight, {batches['short_p95']:.2f} s in static batches, "
            f"{reference['short_p95']:.2f} s diffusers one by one"
        ),
        "served at saturation, images a second": (
            f"{actual['capacity']:.2f} in flight, "
            f"{actual['capacity_by_batches']:.2f} in static batches"
        ),
        "simulation against measurement, p50 and p95 at 60 % load": (
            f"{simulated_row['p50'] / ours['p50']:.2f} and "
            f"{simulated_row['p95'] / ours['p95']:.2f} of it"
        ),
    }


if __name__ == "__main__":
    main()
