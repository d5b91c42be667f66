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

from sdrt.bench.compare import old_report, refuse_slower
from sdrt.bench.plot import check_path, write_plot
from sdrt.bench.report import Contestant, Run, rate_of, report_from, text_from_report
from sdrt.bench.rounds import PARTS, Worker, chosen, contestants, loaded
from sdrt.bundle import Bundle, open_bundle, parse_size
from sdrt.errors import BackendError, UsageError
from sdrt.process_stats import available_bytes, peak_bytes
from sdrt.runtime.samplers.registry import config_from_name

log = logging.getLogger("sdrt.bench")

LIMIT = "limit"


def bench(args: argparse.Namespace) -> None:
    """Prints a table, or JSON; raises UsageError, BundleError, BackendError, and with --compare
    SdrtError for what became slower.
    """
    bundle = open_bundle(args.bundle)
    if "text_encoder" not in bundle.manifest.components:
        raise UsageError(f"{bundle.manifest.name} takes no prompt; bench measures models that do")
    width, height = parse_size(args.size) if args.size else bundle.manifest.sizes[0]
    if not 1 <= args.rounds <= 1000:
        raise UsageError(f"{args.rounds} rounds; expected 1 to 1000")
    if args.plot:
        check_path(args.plot)
    parts, steps = _parts(args.parts), _steps(args.steps)
    run = Run(f"{width}x{height}", steps, args.rounds, parts, args.scheduler)
    if args.scheduler:
        config_from_name(args.scheduler, bundle.json("scheduler/scheduler_config.json"))
    old = old_report(args.compare, bundle.manifest.name, run) if args.compare else None
    found, left_out = contestants(bundle, args.compiled)
    limit, *engines = _measured(bundle, run, chosen(found, args.engines), left_out)
    report = report_from(bundle, run, limit, engines, left_out)
    print(json.dumps(report, indent=2) if args.json else text_from_report(report))
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
    found = tuple(name.strip() for name in text.split(","))
    if unknown := set(found) - set(PARTS):
        raise UsageError(f"no part is called {', '.join(sorted(unknown))}; {', '.join(PARTS)} are")
    return found


def _measured(
    bundle: Bundle, run: Run, engines: Sequence[Contestant], left_out: dict[str, str]
) -> list[Contestant]:
    """The limit and all that could be loaded, with their turns; why others could not is added."""
    workers: list[Worker] = []
    folders = contextlib.ExitStack()
    try:
        for each in [Contestant(LIMIT, LIMIT, "exact"), *engines]:
            free = available_bytes()
            wanted = max((peak_bytes(worker.process_id) for worker in workers), default=0)
            if free < wanted:
                left_out[each.name] = (
                    f"{free / 1e9:.1f} GB of memory are free, the largest before it took "
                    f"{wanted / 1e9:.1f} GB; measure fewer at once with --engines"
                )
                continue
            made = Path(folders.enter_context(tempfile.TemporaryDirectory()))
            try:
                workers.append(loaded(each, bundle, run, made))
            except BackendError as error:
                left_out[each.name] = str(error)
                continue
            log.info("%s: ready after %.2f s", each.name, each.cold_start_seconds)
        for _ in tqdm(range(run.rounds), disable=None, unit="turn", file=sys.stderr):
            _take_turns(workers, run.parts)
        for worker in workers:
            worker.contestant.memory = worker.ask("end")
    finally:
        for worker in workers:
            worker.end()
        folders.close()
    if len(workers) < 2:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise BackendError(f"nothing here can run this bundle: {reasons}")
    return [worker.contestant for worker in workers]


def _take_turns(workers: Sequence[Worker], parts: tuple[str, ...]) -> None:
    """Every part once by every contestant, and the limit before each part."""
    limit, *others = workers
    known = dict.fromkeys(part for worker in others for part in worker.parts)
    for part in (name for name in known if name.startswith(parts)):
        rates = {name.split()[0]: rate_of(limit.turn(name)) for name in limit.parts}
        for worker in others:
            if part in worker.parts:
                worker.turn(part)["limit"] = rates.get(str(worker.contestant.dtype))
