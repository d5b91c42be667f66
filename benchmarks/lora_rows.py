"""What LoRA files of rows' own cost, and what they save against changing the weights.

    python benchmarks/lora_rows.py [--save]
    python benchmarks/lora_rows.py --work FOLDER [--size 256x256] [--divisor 4] [--save]

On the embedded model, or on Stable Diffusion 1.5 with random weights in FOLDER. The files are made
here: rank 16, every linear layer in the UNet's attention blocks; diffusers swaps none of text
encoders.

- A UNet call of the graph with factors, zeros and those of a file, against the plain graph, in
  turns: medians of the ratios of processor time, so that what else runs counts little.
- From one file to another: in the weights, as the factors of a row, and in diffusers (hot-swap).
- Images of eight clients that each send their next request once they have the last image, over 1, 4
  and 16 files at random: with factors of rows, with requests grouped by file, and with diffusers,
  one by one, which swaps where the next request has another file.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from controlnet import example_feeds
from lora_switch import RANK, timed, write_lora
from published import made_bundle, reference_pipeline
from results import save
from similarity import psnr

import sdrt
from sdrt.bundle import parse_size
from sdrt.bundle.manifest import LORA_FACTORS, LORA_PARTS
from sdrt.engine import Engine, Feeds
from sdrt.engine.axes import axis_lengths
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import embedded_checkpoint
from sdrt.runtime import Pipeline
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.lora.sets import merge_loras
from sdrt.runtime.lora.tags import parse_weight

PROMPT = "a red circle on a blue background"
FILES = (1, 4, 16)
CLIENTS = 8
ROWS = (2, 8)  # of the calls that are compared
SCALE = 0.05  # of the factors: images differ, and stay images
ADAPTER = "own"
WAYS = ("rows", "groups", "diffusers")


@dataclass(frozen=True, slots=True)
class Job:
    """A request: its file and its seed."""

    file: Path
    seed: int


def random_jobs(files: Sequence[Path], count: int) -> list[Job]:
    rng = np.random.default_rng(len(files))
    return [Job(files[int(rng.integers(len(files)))], seed) for seed in range(count)]


def call_costs(pipe: Pipeline, files: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Processor time of a call, as a multiple of the plain graph's, by rows."""
    plain, own = pipe.engines["unet"], pipe.engines[LORA_PARTS["unet"]]
    packed = [pack(pipe, file) for file in files]
    costs, size = {}, pipe.manifest.sizes[0]
    for rows in ROWS:
        feeds = example_feeds(plain.inputs, axis_lengths(pipe.manifest, size, rows=rows))
        factors = np.stack([packed[row % len(packed)] for row in range(rows)])
        calls: dict[str, tuple[Engine, Feeds]] = {
            "plain": (plain, feeds),
            "zeros": (own, {**feeds, LORA_FACTORS: np.zeros_like(factors)}),
            "factors": (own, {**feeds, LORA_FACTORS: factors}),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, (engine, inputs) in sorted(calls.items(), reverse=bool(turn % 2)):
                began = time.process_time()
                engine(inputs)
                if turn:
                    times[name].append(time.process_time() - began)
        plain_times = times["plain"]
        ratios = {name: float(np.median(np.divide(of, plain_times))) for name, of in times.items()}
        seconds = {name: statistics.median(of) for name, of in times.items()}
        costs[str(rows)] = {"ratios": ratios, "processor_seconds": seconds}
        print(rows, "rows", ratios, flush=True)
    return costs


def pack(pipe: Pipeline, file: Path) -> np.ndarray:
    assert pipe.lora_rows is not None
    factors = pipe.lora_rows.pack(merge_loras([(file, parse_weight(1.0))])).unet
    assert factors is not None
    return factors


def switch_costs(pipe: Pipeline, reference: Any, files: Sequence[Path]) -> dict[str, float]:
    """Median seconds from one file to another."""
    ways: dict[str, Callable[[Path], float]] = {
        "factors": lambda file: seconds_of(lambda: pack(pipe, file)),
        "weights": lambda file: timed(pipe, {file: 1.0}),
        "hot-swap": lambda file: seconds_of(lambda: swap(reference, file)),
    }
    times = {name: [of(file) for file in files][1:] for name, of in ways.items()}
    pipe.set_lora({})
    costs = {name: statistics.median(of) for name, of in times.items()}
    print("from one file to another, seconds:", costs, flush=True)
    return costs


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def swap(reference: Any, file: Path) -> None:
    """Put a file into diffusers' UNet in place of the last."""
    loaded = ADAPTER in getattr(reference.unet, "peft_config", {})
    reference.unet.load_lora_adapter(str(file), prefix="unet", adapter_name=ADAPTER, hotswap=loaded)


def in_flight(engine: InflightBatcher, jobs: Sequence[Job], steps: int) -> Iterator[np.ndarray]:
    """The images of jobs, of which as many are under way as there are clients."""

    def image_of(job: Job) -> np.ndarray:
        options = {"num_inference_steps": steps, "guidance_scale": 7.5, "seed": job.seed}
        (handle,) = engine.submit(PROMPT, options, scheduler="Euler", loras={job.file: 1.0})
        return np.asarray(handle.future.result().image)

    with ThreadPoolExecutor(CLIENTS) as clients:
        yield from clients.map(image_of, jobs)


def one_by_one(reference: Any, jobs: Sequence[Job], steps: int, size: str) -> Iterator[np.ndarray]:
    """The same with diffusers, which holds a file at a time."""
    import torch

    width, height = parse_size(size)
    loaded = None
    for job in jobs:
        if job.file != loaded:
            swap(reference, loaded := job.file)
        generator = torch.Generator().manual_seed(job.seed)
        options = {"num_inference_steps": steps, "width": width, "height": height}
        yield np.asarray(reference(PROMPT, generator=generator, **options).images[0])


def throughput(
    ways: dict[str, Callable[[Sequence[Job]], Iterator[np.ndarray]]],
    files: Sequence[Path],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Images a second and processor seconds an image: medians of rounds, the ways in turns. On a
    machine that is busy with other work, the former count that too.
    """
    figures: dict[str, Any] = {}
    for count in FILES:
        jobs = random_jobs(files[:count], args.requests)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        images: dict[str, list[np.ndarray]] = {}
        for turn in range(args.rounds):
            for name, way in sorted(ways.items(), reverse=bool(turn % 2)):
                began, processor = time.perf_counter(), time.process_time()
                images[name] = list(way(jobs))
                wall = time.perf_counter() - began
                runs[name].append((wall, time.process_time() - processor))
        row: dict[str, Any] = {}
        for name, of in runs.items():
            wall, processor = (statistics.median(values) for values in zip(*of, strict=True))
            row[name] = {
                "images_per_second": round(len(jobs) / wall, 4),
                "processor_seconds_per_image": round(processor / len(jobs), 4),
                "psnr_to_diffusers": round(
                    min(
                        psnr(image, expected)
                        for image, expected in zip(images[name], images["diffusers"], strict=True)
                    ),
                    1,
                ),
            }
            print(count, "files", f"{name:9}", row[name], flush=True)
        row["changes_of_file"] = sum(a.file != b.file for a, b in itertools.pairwise(jobs))
        figures[str(count)] = row
    return figures


def measure(bundle: Path, checkpoint: Path, size: str, args: argparse.Namespace) -> dict[str, Any]:
    import diffusers

    reference = reference_pipeline(checkpoint, "float32")
    scheduler = diffusers.EulerDiscreteScheduler
    reference.scheduler = scheduler.from_config(reference.scheduler.config)
    with ExitStack() as stack:
        enter = stack.enter_context
        folder = Path(enter(tempfile.TemporaryDirectory()))
        files = [folder / f"{seed}.safetensors" for seed in range(max(FILES))]
        layers = [
            write_lora(bundle, file, seed, parts=("unet",), scale=SCALE)
            for seed, file in enumerate(files)
        ]
        pipe, other = (enter(sdrt.load(bundle, backend="onnxruntime")) for _ in range(2))
        figures = {
            "layers": layers[0],
            "bytes_of_a_row": pack(pipe, files[0]).nbytes,
            "switch_seconds": switch_costs(pipe, reference, files),  # first: no factors are cached
            "calls": call_costs(pipe, files, args.calls),
        }
        rows = enter(InflightBatcher(pipe, slots=CLIENTS))
        groups = enter(InflightBatcher(replace(other, lora_rows=None), slots=CLIENTS))
        ways: dict[str, Callable[[Sequence[Job]], Iterator[np.ndarray]]] = {
            "rows": lambda jobs: in_flight(rows, jobs, args.steps),
            "groups": lambda jobs: in_flight(groups, jobs, args.steps),
            "diffusers": lambda jobs: one_by_one(reference, jobs, args.steps, size),
        }
        for way in ways.values():  # loads, and measures what calls cost
            list(way(random_jobs(files[:2], 2)))
        figures["rows_of_a_call"] = rows.cost_model.for_size(parse_size(size)).full_rows
        return {**figures, "throughput": throughput(ways, files, args)}


def use_threads(count: int) -> None:
    """Compute in so many threads, each on a core, here and in diffusers."""
    import torch

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])
    torch.set_num_threads(count)


def claims_from(figures: dict[str, Any], model: str) -> dict[str, str]:
    switch = figures["switch_seconds"]
    claims = {
        f"{model}: a call of {rows} rows with factors": (
            f"{call['ratios']['factors']:.2f} × the plain graph's processor time, "
            f"{call['ratios']['zeros']:.2f} with none in use"
        )
        for rows, call in figures["calls"].items()
    }
    claims[f"{model}: from one file to another"] = (
        f"{1e3 * switch['weights']:.0f} ms in the weights, {1e3 * switch['factors']:.0f} ms as "
        f"factors, once a file; diffusers {1e3 * switch['hot-swap']:.0f} ms (hot-swap)"
    )
    for count, row in figures["throughput"].items():
        costs = {way: row[way]["processor_seconds_per_image"] for way in WAYS}
        claims[f"{model}: an image over {count} file{'s'[: int(count) > 1]}"] = (
            f"{costs['rows']:.2f} s of processor time with factors of rows, "
            f"{costs['groups']:.2f} s grouped by file; diffusers one by one "
            f"{costs['diffusers']:.2f} s"
        )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for a model of Stable Diffusion 1.5")
    parser.add_argument("--size", default="256x256", help="of its images")
    parser.add_argument("--divisor", type=int, default=4, help="of its widths (default: 4)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--requests", type=int, default=48, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=31, help="that are compared")
    parser.add_argument("--threads", type=int, help="of computation (default: one a core)")
    parser.add_argument(
        "--save", action="store_true", help="keep the figures for the documentation"
    )
    args = parser.parse_args()
    if args.threads:
        use_threads(args.threads)
    if args.work:
        options = "--lora-rank", str(RANK)
        bundle = made_bundle(args.work, [args.size], *options, divisor=args.divisor)
        figures = measure(bundle, args.work / "model", args.size, args)
        width = "" if args.divisor == 1 else f", a {args.divisor}th of the width"
        model, name = f"SD 1.5, {args.size}{width}", f"lora_rows_{args.size}_divisor{args.divisor}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            sizes = ((64, 64),)
            plan = BuildPlan("shapes", output=Path(folder) / "b", sizes=sizes, lora_rank=RANK)
            figures = measure(build_bundle(plan), embedded_checkpoint("shapes"), "64x64", args)
        model, name = "embedded model, 64x64", "lora_rows_shapes"
    if args.threads:
        model += f", {args.threads} thread{'s'[: args.threads > 1]}"
    if args.save:
        save(name, claims_from(figures, model), figures)


if __name__ == "__main__":
    main()
