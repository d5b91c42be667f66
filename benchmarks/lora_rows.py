"""LoRA files of their own for the rows of a batch: what the input costs, and what it saves.

    python benchmarks/lora_rows.py [--work FOLDER --divisor 4 --size 256x256] [--save]

Measured are a UNet call with factors against the plain graph, how long it takes until other files
act, and a stream of requests over 1, 4 and 16 files: as factors of their rows, and grouped by their
files, whose weights are switched. Without --work on the embedded model. Times are
those of the processor, as the machine may be shared. The files are those of `lora_switch.py`.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from lora_switch import RANK, write_lora
from published import made_bundle
from results import save

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import LORA_FACTORS, LORA_PARTS, MANIFEST, json_from_manifest
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.export.lora_graph import write_lora_graph
from sdrt.runtime import Pipeline
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.lora.sets import merge_loras
from sdrt.runtime.lora.tags import parse_weight

PROMPT = "a red circle on a blue background"
COUNTS = (1, 4, 16)  # files in a stream


def open_rows_bundle(work: Path | None, size: str, divisor: int, folder: Path) -> Path:
    """A bundle with LoRA graphs: of the embedded model, or of a published configuration."""
    if work is not None:
        return made_bundle(work, [size], "--lora-rank", str(RANK), divisor=divisor)
    target, embedded = folder / "shapes", open_bundle("shapes")
    shutil.copytree(embedded.folder, target, ignore=shutil.ignore_patterns("plans"))
    components = dict(embedded.manifest.components)
    for part in set(LORA_PARTS) & set(components):  # as a build derives them, not validated again
        derived = write_lora_graph(target / part, RANK, components[part].dtype)
        assert derived is not None
        components[LORA_PARTS[part]] = derived
    manifest = replace(embedded.manifest, components=components, files={})
    records = describe_files(target)
    (target / MANIFEST).write_text(json_from_manifest(replace(manifest, files=records)))
    return target


def measure_calls(pipe: Pipeline, rows: int, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of UNet calls: the plain graph, and the other without and with factors."""
    lengths = axis_lengths(pipe.manifest, pipe.manifest.sizes[0], rows)
    rng, feeds = np.random.default_rng(0), {}
    for spec in pipe.engines[LORA_PARTS["unet"]].inputs:
        shape = spec_shape(spec, lengths)
        feeds[spec.name] = rng.standard_normal(shape, np.float32).astype(spec.dtype)
    feeds["timestep"] = np.full(rows, 500.0, np.float32)
    feeds[LORA_FACTORS] *= np.float32(0.01)
    none = {**feeds, LORA_FACTORS: np.zeros_like(feeds[LORA_FACTORS])}
    plain = {name: value for name, value in feeds.items() if name != LORA_FACTORS}
    calls = {
        "plain": ("unet", plain),
        "none used": (LORA_PARTS["unet"], none),
        "all used": (LORA_PARTS["unet"], feeds),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in sorted(calls, reverse=bool(turn % 2)):
            component, inputs = calls[name]
            seconds = processor_seconds(lambda c=component, i=inputs: pipe.engines[c](i))
            if turn:
                times[name].append(seconds)
    return times


def processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure_switch(pipe: Pipeline, files: Sequence[Path]) -> dict[str, list[float]]:
    """Processor seconds until other files act: read and packed, and put into the weights."""
    assert pipe.lora_rows is not None
    pack, change = pipe.lora_rows.pack, pipe.set_lora
    sets = [merge_loras([(file, parse_weight(0.8))]) for file in files[:4]]
    times = {
        "read": [processor_seconds(lambda s=one: pack(s)) for one in sets],
        "cached": [processor_seconds(lambda s=one: pack(s)) for one in sets],
        "switched": [processor_seconds(lambda f=file: change({f: 0.8})) for file in files[:4]],
    }
    pipe.set_lora({})
    return times


def measure_stream(
    pipe: Pipeline, files: Sequence[Path], requests: int, steps: int
) -> dict[str, float]:
    """Of a stream of requests that is waiting from the start, whose files go round."""
    options = {"num_inference_steps": steps, "guidance_scale": 7.5}
    with InflightBatcher(pipe, slots=16, waiting=requests, rows=32) as engine:
        engine.submit(PROMPT, {**options, "seed": 0})[0].future.result()
        changes, began = pipe.leases.changes, (time.process_time(), time.perf_counter())
        handles = [
            engine.submit(PROMPT, {**options, "seed": i}, loras={files[i % len(files)]: 0.8})[0]
            for i in range(requests)
        ]
        for handle in handles:
            handle.future.result()
        processor, clock = time.process_time() - began[0], time.perf_counter() - began[1]
        changes = pipe.leases.changes - changes
    pipe.set_lora({})
    return {"processor": processor / requests, "clock": clock / requests, "switches": changes}


def measure(bundle: Path, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    files = [folder / f"{i}.safetensors" for i in range(max(COUNTS))]
    for seed, file in enumerate(files):
        write_lora(bundle, file, seed)
    with sdrt.load(bundle, backend="onnxruntime") as pipe:
        figures: dict[str, object] = {
            "calls": {rows: measure_calls(pipe, rows, args.rounds) for rows in (2, 8)},
            "switch": measure_switch(pipe, files),
        }
        grouped = replace(pipe, lora_rows=None)
        figures["streams"] = {
            count: {
                "rows": measure_stream(pipe, files[:count], args.requests, args.steps),
                "grouped": measure_stream(grouped, files[:count], args.requests, args.steps),
            }
            for count in COUNTS
        }
    return figures


def describe(figures: dict[str, object], title: str, steps: int) -> dict[str, str]:
    """A sentence by subject."""
    claims = {}
    for rows, times in figures["calls"].items():  # type: ignore[attr-defined]
        plain = statistics.median(times["plain"])
        more = [100 * (statistics.median(times[n]) / plain - 1) for n in ("none used", "all used")]
        subject = f"a UNet call of {rows} rows with LoRA factors of rank {RANK}, {title}"
        claims[subject] = "none used {:+.0f} %, all used {:+.0f} % time".format(*more)
    switch = {
        name: 1e3 * statistics.median(times)
        for name, times in figures["switch"].items()  # type: ignore[attr-defined]
    }
    claims[f"until another LoRA file acts, {title}"] = (
        f"as factors {switch['read']:.0f} ms, cached {switch['cached']:.1f} ms; "
        f"in the weights {switch['switched']:.0f} ms"
    )
    for count, ways in figures["streams"].items():  # type: ignore[attr-defined]
        rows, grouped = ways["rows"], ways["grouped"]
        claims[f"a stream of images of {steps} steps over {count} LoRA files, {title}"] = (
            f"as factors {rows['processor']:.2f} s an image, grouped by files "
            f"{grouped['processor']:.2f} s with {grouped['switches']:.0f} switches"
        )
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="for a published configuration's bundle")
    parser.add_argument("--divisor", type=int, default=4, help="of its widths (default: 4)")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", action="store_true", help="keep the figures for the docs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bundle = open_rows_bundle(args.work, args.size, args.divisor, Path(work))
        figures = measure(bundle, args, Path(work))
    title, name = "the embedded model", "lora_rows_shapes"
    if args.work is not None:
        title = f"{args.size}, a {args.divisor}th of the width"
        name = f"lora_rows_{args.size}_divisor{args.divisor}"
    claims = describe(figures, title, args.steps)
    for subject, value in claims.items():
        print(f"{subject}: {value}")
    if args.save:
        save(name, claims, figures)


if __name__ == "__main__":
    main()
