"""Regressions since an earlier `sdrt bench --json`, beyond noise.

Knows reports. A measurement counts in seconds, and relative to the matrix product that was timed
with it. A regression is slower in both, so that neither a slow machine nor a fast product decides.
"""

import json
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.errors import SdrtError, UsageError

from .report import BenchSettings

log = logging.getLogger("sdrt.bench")
CHANCE, MIN_RATIO = 0.01, 1.03  # maximum p-value; minimum slowdown
SHUFFLES = 20_000


def read_report(path: Path, bundle: str, run: BenchSettings) -> dict[str, Any]:
    """An earlier report of the same bundle and size, of enough rounds; raises UsageError."""
    try:
        old: dict[str, Any] = json.loads(path.read_text("utf-8"))
        measured = (old["bundle"], old["size"])
        part, *_ = old["engines"][0]["parts"].values()
        turns = part["turns"]
        turns[0]["seconds"]
    except OSError as error:
        raise UsageError(f"failed to read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a report of sdrt bench --json ({type(error).__name__}: {error})"
        ) from error
    if measured != (bundle, run.size):
        raise UsageError(
            f"{path} is of {measured[0]} at {measured[1]}; this would be {bundle} at {run.size}"
        )
    if 1 / math.comb(len(turns) + run.rounds, run.rounds) > CHANCE:  # as little as it can be
        raise UsageError(
            f"{run.rounds} rounds against the {len(turns)} of {path} cannot separate a slowdown "
            "from chance",
            hint="use --rounds 7 for both reports",
        )
    return old


def refuse_slower(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises SdrtError with what is slower; says so if the two ran on different machines."""
    if old.get("machine") != new["machine"]:
        log.warning("The earlier report is from another machine: %s", old.get("machine"))
    if slower := regressions(old, new):
        raise SdrtError("slower than before, beyond noise: " + "; ".join(slower))


def regressions(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for every part of an engine, in both reports, that is slower."""
    before = {engine["name"]: engine["parts"] for engine in old["engines"]}
    lines = []
    for engine in new["engines"]:
        for part, figures in engine["parts"].items():
            earlier = before.get(engine["name"], {}).get(part)
            if earlier and (times := times_slower(earlier["turns"], figures["turns"])):
                lines.append(f"{engine['name']}, {part}: {times:.2f} × the time")
    return lines


def times_slower(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> float | None:
    """How many times as long the turns take, by the smaller of the two measures; None where either
    is within noise.
    """
    measures = [(_seconds(old), _seconds(new))]
    if all(turn["limit"] for turn in [*old, *new]):
        measures.append((_products(old), _products(new)))
    ratios = [statistics.median(now) / statistics.median(then) for then, now in measures]
    if min(ratios) < MIN_RATIO or any(chance(then, now) > CHANCE for then, now in measures):
        return None
    return min(ratios)


def _seconds(turns: Sequence[dict[str, Any]]) -> list[float]:
    return [statistics.median(turn["seconds"]) for turn in turns]


def _products(turns: Sequence[dict[str, Any]]) -> list[float]:
    limits = [turn["limit"] for turn in turns]
    return [seconds * limit for seconds, limit in zip(_seconds(turns), limits, strict=True)]


def chance(then: Sequence[float], now: Sequence[float]) -> float:
    """How likely ranks as high as those of `now` are by luck, if the two do not differ: Wilcoxon's
    rank sum (Biometrics Bulletin 1945), its distribution by shuffling.
    """
    both = np.concatenate([then, now])
    ranks = (both[:, None] > both).sum(1) + ((both[:, None] == both).sum(1) + 1) / 2
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(np.tile(ranks, (SHUFFLES, 1)), axis=1)[:, len(then) :].sum(1)
    return float((shuffled >= ranks[len(then) :].sum()).mean())
