"""The command: who takes part, their processes, and their turns.

Knows workers' answers; not what they time.
"""

import argparse
import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from sdrt.bundle import Bundle, open_bundle, parse_size
from sdrt.engine import candidates
from sdrt.engine.gpu import free_memory, this_machine
from sdrt.errors import BackendError, UsageError
from sdrt.process_stats import available_bytes, peak_bytes
from sdrt.progress import reported
from sdrt.runtime.samplers.registry import config_from_name

from .compare import old_report, refuse_slower
from .peers import peers
from .peers.sdcpp import prepare
from .plot import check_path, write_plot
from .report import Contestant, Run, rate_of, report_from, text_from_report

log = logging.getLogger("sdrt.bench")
LIMIT = "limit"
PARTS = ("text", "unet", "decode", "picture")
PEER_DTYPES = {"exact": "float32", "float32": "float32"}
PEER_DTYPES |= {"bfloat16": "bfloat16", "compiled": "bfloat16"}
WORKER = "from sdrt.bench.worker import main; main()"


def contestants(bundle: Bundle, compiled: bool) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can run, the reference library first, and why others are left out."""
    found, left_out = [], {}
    for name, (backend, precision, why_not) in peers(bundle, compiled).items():
        dtype = PEER_DTYPES.get(precision)
        if why_not is None:
            found.append(Contestant(name, backend, precision, dtype))
        else:
            left_out[name] = why_not
    for each in candidates():
        if each.why_not is not None:
            left_out[each.title] = each.why_not
            continue
        computed = "float32" if each.device == "cpu" else None
        found.append(Contestant(each.title, each.backend, "exact", computed))
        if each.reduced in bundle.manifest.admitted:
            lower = "bfloat16" if str(each.reduced).endswith("bf16") else None
            found.append(Contestant(str(each.reduced), each.backend, "auto", lower))
    return found, left_out


def chosen(found: list[Contestant], names: str | None) -> list[Contestant]:
    """Those whose names hold one of these, separated by commas; all for None."""
    if names is None:
        return found
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(name in each.name for each in found):
            have = ", ".join(each.name for each in found)
            raise UsageError(f"no engine here is called {name!r}; here are: {have}")
    return [each for each in found if any(name in each.name for name in wanted)]


class Worker:
    """A contestant's process; raises BackendError with what it last said where it ends early."""

    def __init__(self, each: Contestant, bundle: Bundle, run: Run, made: Path) -> None:
        wanted: dict[str, Any] = {"backend": each.backend, "precision": each.precision}
        wanted |= {"folder": str(bundle.folder), "size": run.size, "steps": run.steps}
        wanted |= {"scheduler": run.scheduler, "made": str(made)}
        self.contestant, self.parts = each, list[str]()
        self._said: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(wanted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def load(self) -> None:
        """Wait until it has drawn its first picture."""
        each, gpus = self.contestant, this_machine().gpus
        free = free_memory(gpus[0]) if gpus else None
        answer = self.answer()
        each.cold_start_seconds = time.perf_counter() - self._began
        each.load_seconds, self.parts = answer["load_seconds"], answer["parts"]
        if free is not None and (left := free_memory(gpus[0])) is not None:
            each.device_bytes = free - left

    @property
    def process_id(self) -> int:
        return self._process.pid

    def turn(self, part: str) -> dict[str, Any]:
        """A turn of a part, kept among the contestant's."""
        made = self.ask(part)
        self.contestant.turns.setdefault(part, []).append(made)
        return made

    def ask(self, part: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{part}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._said.seek(0)
        said = [text.strip() for text in self._said if text.strip()] or ["it said nothing"]
        raise BackendError(f"{self.contestant.name} ended while it was measured: {said[-1]}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()


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


def loaded(each: Contestant, bundle: Bundle, run: Run, made: Path) -> Worker:
    """Its process, after its first picture; raises BackendError.

    made: an empty folder for what it reads in place of the bundle
    """
    prepare(each.backend, bundle, made)
    worker = Worker(each, bundle, run, made)
    try:
        with reported(lambda: f"starting {each.name}"):
            worker.load()
    except BaseException:
        worker.end()
        raise
    return worker


def _take_turns(workers: Sequence[Worker], parts: tuple[str, ...]) -> None:
    """Every part once by every contestant, and the limit before each part."""
    limit, *others = workers
    known = dict.fromkeys(part for worker in others for part in worker.parts)
    for part in (name for name in known if name.startswith(parts)):
        rates = {name.split()[0]: rate_of(limit.turn(name)) for name in limit.parts}
        for worker in others:
            if part in worker.parts:
                worker.turn(part)["limit"] = rates.get(str(worker.contestant.dtype))
