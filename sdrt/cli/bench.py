"""`sdrt bench`: from arguments to a report. Imported by the command line when it runs."""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from sdrt.bench.compare import read_report, refuse_slower
from sdrt.bench.plot import check_path, write_plot
from sdrt.bench.report import BenchSettings, Contestant, build_report, format_report, rate_of
from sdrt.bench.rounds import PARTS, Worker, list_contestants, select_contestants, start_worker
from sdrt.bundle import Bundle, open_bundle, parse_size
from sdrt.errors import BackendError, UsageError
from sdrt.process_stats import available_bytes, resident_bytes
from sdrt.runtime.samplers.registry import config_from_name

log = logging.getLogger("sdrt.bench")

LIMIT = "limit"
MARGIN = 1.15  # an engine may need this many times what the largest loaded one holds


def bench(args: argparse.Namespace) -> None:
    """Prints a table, or JSON; raises UsageError, BundleError, BackendError, and with --compare
    SdrtError for what became slower.
    """
    bundle = open_bundle(args.bundle)
    if bundle.manifest.is_refiner:
        raise UsageError(
            f"{bundle.manifest.name} is a refiner; `sdrt bench` measures models that run from noise"
        )
    if "text_encoder" not in bundle.manifest.components:
        raise UsageError(
            f"{bundle.manifest.name} accepts no prompt; `sdrt bench` measures models that do"
        )
    width, height = parse_size(args.size) if args.size else bundle.manifest.sizes[0]
    if not 1 <= args.rounds <= 1000:
        raise UsageError(f"{args.rounds} rounds; expected 1 to 1000")
    if args.plot:
        check_path(args.plot)
    parts, steps = _parts(args.parts), _steps(args.steps)
    run = BenchSettings(f"{width}x{height}", steps, args.rounds, parts, args.scheduler)
    if args.scheduler:
        config_from_name(args.scheduler, bundle.json("scheduler/scheduler_config.json"))
    old = read_report(args.compare, bundle.manifest.name, run) if args.compare else None
    runnable, left_out = list_contestants(bundle, args.compiled, args.exact)
    limit, *engines = _measured(bundle, run, select_contestants(runnable, args.engines), left_out)
    report = build_report(bundle, run, limit, engines, left_out)
    print(json.dumps(report, indent=2) if args.json else format_report(report))
    if args.plot:
        write_plot(report, args.plot)
    if old is not None:
        refuse_slower(old, report)


def _steps(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if all(part.isdigit() and 1 <= int(part) <= 1000 for part in parts):
        return tuple(dict.fromkeys(int(part) for part in parts))
    raise UsageError(f"steps {text!r}; expected 1 to 1000, such as --steps 20 or --steps 1,4,20")


def _parts(text: str | None) -> tuple[str, ...]:
    if text is None:
        return PARTS
    parts = tuple(name.strip() for name in text.split(","))
    if unknown := set(parts) - set(PARTS):
        raise UsageError(f"unknown part {', '.join(sorted(unknown))}; expected {', '.join(PARTS)}")
    return parts


def _measured(
    bundle: Bundle, run: BenchSettings, engines: Sequence[Contestant], left_out: dict[str, str]
) -> list[Contestant]:
    """The limit and every engine that loads, with measurements; adds why the others do not."""
    workers: list[Worker] = []
    folders = contextlib.ExitStack()
    try:
        for contestant in [Contestant(LIMIT, LIMIT, "exact"), *engines]:
            free = available_bytes()
            # Not their peaks, which include pages of mapped files.
            largest = max((resident_bytes(worker.process_id) for worker in workers), default=0)
            required = MARGIN * largest
            if free < required:
                left_out[contestant.name] = (
                    f"{free / 1e9:.1f} GB of memory are free, but it may need "
                    f"{required / 1e9:.1f} GB, estimated from the largest engine loaded so far; "
                    "measure fewer at once with --engines"
                )
                continue
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory()))
            try:
                workers.append(start_worker(contestant, bundle, run, folder))
            except BackendError as error:
                left_out[contestant.name] = str(error)
                continue
            log.info("%s: ready after %.2f s", contestant.name, contestant.cold_start_seconds)
        for _ in tqdm(range(run.rounds), disable=None, unit="round", file=sys.stderr):
            _measure_round(workers, run.parts)
        for worker in workers:
            worker.contestant.memory = worker.ask("end")
    finally:
        for worker in workers:
            worker.kill()
        folders.close()
    if len(workers) < 2:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise BackendError(f"no engine can run this bundle: {reasons}")
    return [worker.contestant for worker in workers]


def _measure_round(workers: Sequence[Worker], parts: tuple[str, ...]) -> None:
    """Measure every part of every contestant once, and the limit before each part."""
    limit, *others = workers
    known = dict.fromkeys(part for worker in others for part in worker.parts)
    for part in (name for name in known if name.startswith(parts)):
        rates = {name.split()[0]: rate_of(limit.measure(name)) for name in limit.parts}
        for worker in others:
            if part in worker.parts:
                worker.measure(part)["limit"] = rates.get(str(worker.contestant.dtype))
