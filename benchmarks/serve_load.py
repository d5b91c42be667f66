"""Requests as they come, served three ways in one run: in flight, by whole batches, and by a loop
over diffusers.

    python benchmarks/serve_load.py [--requests 100] [--rounds 3] [--loads 0.3,0.6,0.9] [--save]
    python benchmarks/serve_load.py [--mix] [--wall] [--work FOLDER] [--save]

Poisson arrivals, the same for all three: 4 to 50 steps, guided and not, three samplers, two sizes,
on the embedded model. The capacity is what the engine in flight makes when it is never idle. The
whole batches are kinder than those of servers that batch only requests of equal steps, sampler and
guidance; see `serve_contestants.py`. The simulation of `serve_sim.py` runs the same
arrivals on what preparing, calls and decoding took in the run in flight.

All of it runs on one core, and seconds are those that the process had the core; while there is
nothing to do the clock skips to the next arrival. So what else the machine does changes nothing.
With --wall it runs on all cores, without the simulation, and seconds are those of the clock.

With --mix the bundle is built with --lora-rank, two of five requests name one of four LoRA files
and one of five has a ControlNet, `outline`. The batches share calls of different LoRA files too, or
have one file each in the weights. LoRA files and control never share a call. Without diffusers.
"""

import argparse
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from lora_switch import write_lora
from published import reference_pipeline
from results import save
from serve_contestants import (
    SIZES,
    Clock,
    Job,
    WallClock,
    by_batches,
    fresh,
    in_flight,
    one_by_one,
    random_job,
)
from serve_sim import poisson, simulated

import sdrt
from sdrt.engine import Engine, Feeds
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import embedded_checkpoint
from sdrt.runtime import Pipeline
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.batching.scheduler import CostEstimates, ScheduledRequest

SHORT = 8  # steps of what is called short
LORA_RANK, LORA_FILES = 8, 4
IN_FLIGHT, BATCHES, BY_FILE, ONE_BY_ONE = (
    *("in flight", "in static batches", "in static batches by LoRA file"),
    "diffusers, one by one",
)


class Timed:
    """An engine that records its calls: side and rows of the input, and the processor seconds that
    its thread had before.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.calls: list[tuple[int, int, float]] = []

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        rows, *_, side = next(iter(feeds.values())).shape
        self.calls.append((side, rows, time.thread_time()))
        return self.engine(feeds)

    def refit(self, weights: Feeds) -> None:
        self.engine.refit(weights)

    def close(self) -> None:
        self.engine.close()

    def mean_seconds(self, thread: str) -> dict[tuple[int, int], float]:
        """By side and rows, from a call to the thread's next one: with all that it does besides."""
        grouped = defaultdict(list)
        following = [began for _, _, began in self.calls[1:]] + [thread_seconds(thread)]
        for (side, rows, began), end in zip(self.calls, following, strict=True):
            grouped[side, rows].append(end - began)
        return {key: float(np.mean(values)) for key, values in grouped.items()}


def thread_seconds(name: str) -> float:
    """Processor seconds of a thread."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == name)
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def measured_rates(pipe: Pipeline, rates: CostEstimates, prepare_seconds: float) -> CostEstimates:
    """What the engine's threads took for their parts of a run, in place of what was expected."""
    unet, decoder = pipe.engines["unet"], pipe.engines["vae_decoder"]
    assert isinstance(unet, Timed) and isinstance(decoder, Timed)
    evaluations, decodes = unet.mean_seconds("sdrt_denoise"), decoder.mean_seconds("sdrt_decode")

    def side(group: Any) -> int:
        return int(group[0][0] // pipe.manifest.downscale)

    def evaluation(group: Any, rows: int) -> float:
        """Between the rows of the run's calls, and beyond them, by lines."""
        seen = {key[1]: value for key, value in evaluations.items() if key[0] == side(group)}
        return float(np.interp(rows, sorted(seen), [seen[key] for key in sorted(seen)]))

    return replace(
        rates,
        call_seconds=cache(evaluation),
        prepare_seconds=lambda _: prepare_seconds,
        decode_seconds=lambda group: decodes[side(group), 1],
    )


def figures_of(jobs: Sequence[Job], alone: Callable[[Job], float]) -> dict[str, float]:
    """alone: seconds that a job takes if nothing else runs."""
    accepted = [job for job in jobs if not job.refused]
    every = np.array([job.done - job.at for job in accepted])
    short = [job.done - job.at for job in accepted if job.steps <= SHORT]
    slowed = every / np.array([alone(job) for job in accepted])
    values = {
        **{f"p{q}": float(np.percentile(every, q)) for q in (50, 95, 99)},
        "short_p95": float(np.percentile(short, 95)),
        "first_step_p50": float(np.nanmedian([job.first - job.at for job in accepted])),
        "refused": sum(job.refused for job in jobs),
        # Jain 1984: 1 where all are slowed down alike
        "fairness": float(slowed.sum() ** 2 / (len(slowed) * (slowed**2).sum())),
    }
    return {name: round(value, 4) for name, value in values.items()}


def measured(
    engine: InflightBatcher, clock: Clock, args: argparse.Namespace, loras: Sequence[Path]
) -> dict[str, Any]:
    ways: dict[str, Callable[[Sequence[Job]], object]] = {
        IN_FLIGHT: partial(in_flight, engine=engine, clock=clock),
        BATCHES: partial(by_batches, pipe=engine.pipe, clock=clock, max_batch=args.batch),
    }
    if loras:
        ways[BY_FILE] = partial(ways[BATCHES], by_file=True)
    create = partial(random_job, loras=loras)
    burst = poisson(args.requests, 1e6, create, 7)
    for way in ways.values():  # loads the graphs that are loaded when they are needed
        way(fresh(burst))
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        for name, way in ways.items():
            jobs = fresh(burst)
            way(jobs)
            rates[name].append(len(jobs) / max(job.done for job in jobs))
    saturated = {name: round(float(np.median(values)), 3) for name, values in rates.items()}
    print("images a second when never idle:", saturated, flush=True)
    if not loras:
        reference = reference_pipeline(embedded_checkpoint("shapes"), "float32")
        ways[ONE_BY_ONE] = partial(one_by_one, reference=reference, clock=clock)
    actual: dict[str, Any] = {
        "rows_of_a_call": max(size.full_rows for size in engine.cost_model.sizes.values()),
        "saturated": saturated,
    }
    for load in args.loads:
        done: dict[str, list[Job]] = defaultdict(list)
        for number in range(args.rounds):
            arrivals = poisson(args.requests, load * saturated[IN_FLIGHT], create, 11 + number)
            for name, way in ways.items():
                jobs = fresh(arrivals)
                if name == IN_FLIGHT and not (loras or args.wall):
                    done["simulated"] += simulated_jobs(engine, jobs, clock)
                else:
                    way(jobs)
                done[name] += jobs
        actual[f"{load:.0%}"] = {
            name: figures_of(jobs, partial(solo_seconds, engine)) for name, jobs in done.items()
        }
        for name, row in actual[f"{load:.0%}"].items():
            show(load, name, row)
    return actual


def solo_seconds(engine: InflightBatcher, job: Job) -> float:
    turn = ScheduledRequest((job.size,), job.rows, job.steps, 0.0, 0.0)
    return engine.estimates.solo_seconds(turn)


def simulated_jobs(engine: InflightBatcher, jobs: Sequence[Job], clock: Clock) -> list[Job]:
    """Serve jobs in flight; returns them in simulation, on what their parts took."""
    for timed in (engine.pipe.engines["unet"], engine.pipe.engines["vae_decoder"]):
        assert isinstance(timed, Timed)
        timed.calls.clear()
    preparing = -thread_seconds("sdrt_prepare")
    preparing += in_flight(jobs, engine, clock) + thread_seconds("sdrt_prepare")
    rates = measured_rates(engine.pipe, engine.estimates, preparing / len(jobs))
    imagined = fresh(jobs)
    simulated(imagined, rates, 1, engine.slots, shared=True, expected=engine.estimates)
    for job in imagined:
        job.first = job.begun
    return imagined


def show(load: float, name: str, row: dict[str, float]) -> None:
    print(f"{load:4.0%}  {name:30}", "  ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of every load, with other arrivals")
    parser.add_argument(
        "--loads", type=lambda t: [float(p) for p in t.split(",")], default="0.3,0.6,0.9"
    )
    parser.add_argument("--batch", type=int, default=8, help="images of a static batch")
    parser.add_argument("--mix", action="store_true", help="with LoRA files and a ControlNet")
    parser.add_argument("--wall", action="store_true", help="all cores, seconds of the clock")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where bundles stay built")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rank, nets = (LORA_RANK, ["outline"]) if args.mix else (None, [])
    with tempfile.TemporaryDirectory() as folder:
        output = (args.work or Path(folder)) / f"shapes{'-lora' * args.mix}"
        if not output.exists():
            build_bundle(BuildPlan("shapes", output=output, sizes=SIZES, lora_rank=rank))
        loras = [Path(folder) / f"{i}.safetensors" for i in range(LORA_FILES if args.mix else 0)]
        for seed, path in enumerate(loras):
            write_lora(output, path, seed, LORA_RANK)
        clock = WallClock() if args.wall else run_on_one_core()
        with sdrt.load(output, backend="onnxruntime", controlnet=nets) as loaded:
            timed = {name: Timed(loaded.engines[name]) for name in ("unet", "vae_decoder")}
            pipe = replace(loaded, engines={**loaded.engines, **timed})
            with InflightBatcher(pipe, waiting=10_000) as engine:
                actual = measured(engine, clock, args, loras)
    if args.save:
        name = f"serve_load{'_mix' * args.mix}{'_wall' * args.wall}"
        save(name, claims_from(actual, args.mix, args.wall), actual)


def run_on_one_core() -> Clock:
    """Let the process and what it times run by the returned clock."""
    import torch

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    clock = Clock()
    for name in ("monotonic", "perf_counter"):
        setattr(time, name, clock.now)
    return clock


def claims_from(actual: dict[str, Any], mix: bool, wall: bool) -> dict[str, str]:
    row, saturated = actual["60%"], actual["saturated"]
    short = (f"{row[way]['short_p95']:.2f} s {way}" for way in row if way != "simulated")
    said = (
        f"served{' with LoRA files and ControlNet' * mix} on {'all cores' if wall else 'one core'}"
    )
    claims = {
        f"{said} at 60 % load, 95 % of requests of up to 8 steps": ", ".join(short),
        f"{said} at saturation, images a second": (
            ", ".join(f"{rate:.2f} {way}" for way, rate in saturated.items())
        ),
    }
    for load, row in actual.items():
        if load.endswith("%") and "simulated" in row:
            ratios = [row["simulated"][key] / row[IN_FLIGHT][key] for key in ("p50", "p95")]
            claims[f"simulation against measurement, p50 and p95 at {load[:-1]} % load"] = (
                "{:.2f} and {:.2f} of it".format(*ratios)
            )
    return claims


if __name__ == "__main__":
    main()
