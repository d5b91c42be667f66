"""The results of a benchmark, as plain values and as text.

Knows contestants' measurements; not how they were taken.
"""

import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import Bundle, parse_size
from sdrt.engine.axes import axis_lengths
from sdrt.engine.cpu import has_amx, has_bf16
from sdrt.process_stats import cpu_count

from .flops import flops
from .roofline import FLOPS

LOADED = 0.15  # fraction of the processor used by others that marks a measurement
GRAPHS = {"text": ("text_encoder", "text_encoder_2"), "unet": ("unet",), "decode": ("vae_decoder",)}
TITLES = {"text": "text, 2 rows", "unet": "UNet, 2 rows", "decode": "decode"}
PACKAGES = (
    "numpy",
    "onnxruntime",
    "openvino",
    "torch",
    "diffusers",
    "transformers",
    "tensorrt-rtx",
)
HEAD = ("p50", "p90", "p99", "×", "a second", "of limit")
Measurement = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is measured: a size such as 512x512, steps of complete images, rounds, the parts by the
    beginning of their names, and a sampler's name if it is not the bundle's.
    """

    size: str
    steps: tuple[int, ...]
    rounds: int
    parts: tuple[str, ...] = ("text", "unet", "decode", "picture")
    scheduler: str | None = None


@dataclass(slots=True)
class Contestant:
    """One engine or peer: the arguments of its worker, and what was measured; seconds and bytes.

    dtype: that it computes in, and whose limit it is held against; None if that is not known here
    static: whether it is compiled for the size that is measured
    cold_start_seconds: from the process's start to its first image
    turns: of every part, in order, as `worker.turn` gives them
    """

    name: str
    backend: str
    precision: str
    dtype: str | None = None
    static: bool = False
    load_seconds: float = 0.0
    cold_start_seconds: float = 0.0
    device_bytes: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    turns: dict[str, list[Measurement]] = field(default_factory=dict)


def build_report(
    bundle: Bundle,
    run: BenchSettings,
    limit: Contestant,
    engines: Sequence[Contestant],
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Every measurement, and the machine and versions they were taken with."""
    work = {part: _flops(bundle, names, run.size) for part, names in GRAPHS.items()}
    limits = {
        name.split()[0]: {
            "library": name.split()[1],
            "flops_per_second": statistics.median(rate_of(turn) for turn in turns),
        }
        for name, turns in limit.turns.items()
    }
    return {
        "bundle": bundle.manifest.name,
        "size": run.size,
        "steps": list(run.steps),
        "rounds": run.rounds,
        "scheduler": run.scheduler,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": list_versions(),
        "flops": work,
        "limits": limits,
        "engines": [_described(contestant, engines[0], work) for contestant in engines],
        "left_out": left_out,
    }


def machine() -> str:
    """Processor, whether it multiplies in bfloat16, cores in use and system, in words."""
    name, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    bf16 = "no bf16" if not has_bf16() else "bf16 on AMX" if has_amx() else "bf16"
    return f"{name}, {bf16}, {cpu_count()} cores, {platform.system()}"


def list_versions() -> dict[str, str]:
    """Of Python and of the packages that do the work, where they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _flops(bundle: Bundle, names: tuple[str, ...], size: str) -> int | None:
    """Of one call as it is timed: two rows, or one image; None where the graph has unknown axes."""
    rows = 1 if "vae_decoder" in names else 2
    axes = axis_lengths(bundle.manifest, parse_size(size), rows)
    held = [name for name in names if name in bundle.manifest.components]
    try:
        return sum(flops(bundle.graph(name), axes) for name in held)
    except ValueError:
        return None


def rate_of(turn: Measurement) -> float:
    """Operations a second of the fastest product in a turn of the limit."""
    return FLOPS / float(min(turn["seconds"]))


def _described(
    contestant: Contestant, base: Contestant, work: dict[str, int | None]
) -> dict[str, Any]:
    others = [turn["others"] for turns in contestant.turns.values() for turn in turns]
    known = [fraction for fraction in others if fraction is not None]
    return {
        "name": contestant.name,
        "dtype": contestant.dtype,
        "load_seconds": contestant.load_seconds,
        "cold_start_seconds": contestant.cold_start_seconds,
        "memory": contestant.memory,
        "device_bytes": contestant.device_bytes,
        "others": statistics.median(known) if known else None,
        "loaded_turns": sum(fraction > LOADED for fraction in known),
        "parts": {
            part: _part(turns, base.turns.get(part), work.get(part))
            for part, turns in contestant.turns.items()
        },
    }


def _part(
    turns: Sequence[Measurement], base: Sequence[Measurement] | None, work: int | None
) -> dict[str, Any]:
    """One part's figures: percentiles over all calls, in seconds; what is against the base or the
    limit is taken turn by turn, and the median of that.
    """
    calls = [seconds for turn in turns for seconds in turn["seconds"]]
    p50, p90, p99 = np.percentile(calls, [50, 90, 99]).tolist()
    own = [statistics.median(turn["seconds"]) for turn in turns]
    figures: dict[str, Any] = {"p50": p50, "p90": p90, "p99": p99, "per_second": 1 / p50}
    if base is not None:
        theirs = (statistics.median(turn["seconds"]) for turn in base)
        pairs = zip(theirs, own, strict=True)
        figures["times_faster"] = statistics.median(their / mine for their, mine in pairs)
    if work:
        figures["flops_per_second"] = work / p50
        if limits := [turn["limit"] for turn in turns if turn["limit"]]:
            pairs = zip(own, limits, strict=True)
            figures["of_limit"] = statistics.median(work / mine / limit for mine, limit in pairs)
    if any(turn["parts"] for turn in turns):
        figures["parts"] = _part_times(turns)
    marked = [turn["others"] is not None and turn["others"] > LOADED for turn in turns]
    figures["turns"] = [
        {
            "seconds": [round(seconds, 7) for seconds in turn["seconds"]],
            "others": turn["others"],
            "loaded": loaded,
            "limit": turn["limit"],
        }
        for turn, loaded in zip(turns, marked, strict=True)
    ]
    return figures


def _part_times(turns: Sequence[Measurement]) -> dict[str, float]:
    """Seconds of each part of an image; the rest is the pipeline's own."""
    times = [
        {**turn["parts"], "own": statistics.mean(turn["seconds"]) - sum(turn["parts"].values())}
        for turn in turns
    ]
    names = dict.fromkeys(name for part_times in times for name in part_times)
    return {
        name: statistics.median(part_times.get(name, 0.0) for part_times in times) for name in names
    }


def format_report(report: dict[str, Any]) -> str:
    """Tables: every part by engine, what each engine takes, where the time of an image goes."""
    limits = ", ".join(
        f"{dtype} {limit['flops_per_second'] / 1e9:.0f} GFLOP/s ({limit['library']})"
        for dtype, limit in report["limits"].items()
    )
    lines = [
        f"{report['bundle']} at {report['size']}, {report['rounds']} rounds, {report['machine']}",
        f"limit, by matrix products in the same rounds: {limits}",
        "",
        f"{'milliseconds':28}" + "".join(f"{title:>10}" for title in HEAD),
    ]
    parts = dict.fromkeys(part for engine in report["engines"] for part in engine["parts"])
    for part in parts:
        lines.append(_title(part))
        lines += [_part_line(engine, part) for engine in report["engines"]]
    lines += ["", *_resource_lines(report["engines"]), "", *_part_time_lines(report["engines"])]
    lines += [f"skipped {name}: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines)


def _title(part: str) -> str:
    return TITLES.get(part, part)


def _part_line(engine: dict[str, Any], part: str) -> str:
    figures = engine["parts"].get(part)
    if figures is None:
        return f"  {engine['name']:26}{'–':>10}"
    cells = "".join(f"{figures[key] * 1e3:>10.1f}" for key in ("p50", "p90", "p99"))
    times = f"{figures['times_faster']:.2f}" if "times_faster" in figures else "–"
    fraction = f"{figures['of_limit']:.0%}" if "of_limit" in figures else "–"
    return f"  {engine['name']:26}{cells}{times:>10}{figures['per_second']:>10.2f}{fraction:>10}"


def _resource_lines(engines: Sequence[dict[str, Any]]) -> list[str]:
    """Starting, memory, and how much of the processor others had."""
    head = ("load s", "cold start s", "resident MB", "of it mapped", "peak MB", "device MB")
    lines = [f"{'':28}" + "".join(f"{title:>14}" for title in head) + "   others"]
    for engine in engines:
        memory = engine["memory"]
        held = [memory.get(key) for key in ("resident", "mapped", "peak")]
        cells = [f"{engine['load_seconds']:.2f}", f"{engine['cold_start_seconds']:.2f}"]
        cells += ["–" if b is None else f"{b / 1e6:.0f}" for b in [*held, engine["device_bytes"]]]
        others, loaded = engine["others"], engine["loaded_turns"]
        mark = f" ({loaded} turns > {LOADED:.0%})" if loaded else ""
        fraction = "–" if others is None else f"{others:.0%}{mark}"
        row = "".join(f"{cell:>14}" for cell in cells)
        lines.append(f"  {engine['name']:26}{row}   {fraction}")
    return lines


def _part_time_lines(engines: Sequence[dict[str, Any]]) -> list[str]:
    """Where the time of an image goes, in milliseconds."""
    names = ("text", "unet", "decode", "own", "PNG")
    lines = [f"{'where an image’s time goes, ms':36}" + "".join(f"{name:>10}" for name in names)]
    for engine in engines:
        for part, figures in engine["parts"].items():
            if part.startswith("picture"):
                times = figures["parts"]
                cells = "".join(f"{times.get(name, 0.0) * 1e3:>10.1f}" for name in names)
                lines.append(f"  {engine['name'] + ', ' + part.split(', ')[1]:34}{cells}")
    return lines
