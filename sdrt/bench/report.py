"""What was measured, as plain values and as text.

Knows contestants' turns; not how they were taken.
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
from sdrt.process_stats import cpu_count

from .flops import flops
from .roofline import FLOPS

LOADED = 0.15  # the share of the processor by others from which on a turn is marked
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
Turn = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured: a size such as 512x512, steps of whole pictures, rounds of turns, which
    parts by what their names begin with, and a sampler's name if it is not the bundle's.
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
    cold_start_seconds: from the process's start to its first picture
    turns: of every part, in order, as `worker.turn` gives them
    """

    name: str
    backend: str
    precision: str
    dtype: str | None = None
    load_seconds: float = 0.0
    cold_start_seconds: float = 0.0
    device_bytes: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    turns: dict[str, list[Turn]] = field(default_factory=dict)


def report_from(
    bundle: Bundle,
    run: Run,
    limit: Contestant,
    engines: Sequence[Contestant],
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Everything that was measured, and on what."""
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
        "versions": versions(),
        "flops": work,
        "limits": limits,
        "engines": [_described(each, engines[0], work) for each in engines],
        "left_out": left_out,
    }


def machine() -> str:
    """Processor, cores in use and system, in words."""
    name, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    cores = cpu_count()
    return f"{name}, {cores} cores, {platform.system()}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that do the work, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _flops(bundle: Bundle, names: tuple[str, ...], size: str) -> int | None:
    """Of one call as it is timed: two rows, or one picture; None for a graph that does not say."""
    rows = 1 if "vae_decoder" in names else 2
    axes = axis_lengths(bundle.manifest, parse_size(size), rows)
    held = [name for name in names if name in bundle.manifest.components]
    try:
        return sum(flops(bundle.graph(name), axes) for name in held)
    except ValueError:
        return None


def rate_of(turn: Turn) -> float:
    """Operations a second of a turn of the limit's product."""
    return FLOPS / float(np.median(turn["seconds"]))


def _described(each: Contestant, base: Contestant, work: dict[str, int | None]) -> dict[str, Any]:
    others = [turn["others"] for turns in each.turns.values() for turn in turns]
    known = [share for share in others if share is not None]
    return {
        "name": each.name,
        "dtype": each.dtype,
        "load_seconds": each.load_seconds,
        "cold_start_seconds": each.cold_start_seconds,
        "memory": each.memory,
        "device_bytes": each.device_bytes,
        "others": statistics.median(known) if known else None,
        "loaded_turns": sum(share > LOADED for share in known),
        "parts": {
            part: _part(turns, base.turns.get(part), work.get(part))
            for part, turns in each.turns.items()
        },
    }


def _part(turns: Sequence[Turn], base: Sequence[Turn] | None, work: int | None) -> dict[str, Any]:
    """One part's figures: percentiles over all calls, in seconds; what is against the base or the
    limit is taken turn by turn, and the median of that.
    """
    calls = [seconds for turn in turns for seconds in turn["seconds"]]
    p50, p90, p99 = np.percentile(calls, [50, 90, 99]).tolist()
    own = [statistics.median(turn["seconds"]) for turn in turns]
    found: dict[str, Any] = {"p50": p50, "p90": p90, "p99": p99, "per_second": 1 / p50}
    if base is not None:
        theirs = (statistics.median(turn["seconds"]) for turn in base)
        pairs = zip(theirs, own, strict=True)
        found["times_faster"] = statistics.median(their / mine for their, mine in pairs)
    if work:
        found["flops_per_second"] = work / p50
        if limits := [turn["limit"] for turn in turns if turn["limit"]]:
            pairs = zip(own, limits, strict=True)
            found["of_limit"] = statistics.median(work / mine / limit for mine, limit in pairs)
    if any(turn["parts"] for turn in turns):
        found["parts"] = _shares(turns)
    marked = [turn["others"] is not None and turn["others"] > LOADED for turn in turns]
    found["turns"] = [
        {
            "seconds": [round(seconds, 7) for seconds in turn["seconds"]],
            "others": turn["others"],
            "loaded": loaded,
            "limit": turn["limit"],
        }
        for turn, loaded in zip(turns, marked, strict=True)
    ]
    return found


def _shares(turns: Sequence[Turn]) -> dict[str, float]:
    """Seconds of each part of a picture; what is left of the whole is the pipeline's own."""
    shares = [
        {**turn["parts"], "own": statistics.mean(turn["seconds"]) - sum(turn["parts"].values())}
        for turn in turns
    ]
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: statistics.median(share.get(name, 0.0) for share in shares) for name in names}


def text_from_report(report: dict[str, Any]) -> str:
    """Tables: every part by engine, what each engine takes, where a picture's time goes."""
    limits = ", ".join(
        f"{dtype} {limit['flops_per_second'] / 1e9:.0f} GFLOP/s ({limit['library']})"
        for dtype, limit in report["limits"].items()
    )
    lines = [
        f"{report['bundle']} at {report['size']}, {report['rounds']} rounds, {report['machine']}",
        f"limit, a product of matrices in the same turns: {limits}",
        "",
        f"{'milliseconds':28}" + "".join(f"{title:>10}" for title in HEAD),
    ]
    parts = dict.fromkeys(part for engine in report["engines"] for part in engine["parts"])
    for part in parts:
        lines.append(_title(part))
        lines += [_part_line(engine, part) for engine in report["engines"]]
    lines += ["", *_taken_lines(report["engines"]), "", *_share_lines(report["engines"])]
    lines += [f"left out: {name}: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines)


def _title(part: str) -> str:
    return TITLES.get(part, part)


def _part_line(engine: dict[str, Any], part: str) -> str:
    found = engine["parts"].get(part)
    if found is None:
        return f"  {engine['name']:26}{'–':>10}"
    cells = "".join(f"{found[key] * 1e3:>10.1f}" for key in ("p50", "p90", "p99"))
    times = f"{found['times_faster']:.2f}" if "times_faster" in found else "–"
    share = f"{found['of_limit']:.0%}" if "of_limit" in found else "–"
    return f"  {engine['name']:26}{cells}{times:>10}{found['per_second']:>10.2f}{share:>10}"


def _taken_lines(engines: Sequence[dict[str, Any]]) -> list[str]:
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
        share = "–" if others is None else f"{others:.0%}{mark}"
        row = "".join(f"{cell:>14}" for cell in cells)
        lines.append(f"  {engine['name']:26}{row}   {share}")
    return lines


def _share_lines(engines: Sequence[dict[str, Any]]) -> list[str]:
    """Where the time of a picture goes, in milliseconds."""
    names = ("text", "unet", "decode", "own", "PNG")
    lines = [f"{'where a picture’s time goes, ms':36}" + "".join(f"{name:>10}" for name in names)]
    for engine in engines:
        for part, found in engine["parts"].items():
            if part.startswith("picture"):
                shares = found["parts"]
                cells = "".join(f"{shares.get(name, 0.0) * 1e3:>10.1f}" for name in names)
                lines.append(f"  {engine['name'] + ', ' + part.split(', ')[1]:34}{cells}")
    return lines
