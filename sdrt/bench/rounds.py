"""Rounds of a measurement: who takes part, their processes, and their turns.

Knows workers' answers; not what they time.
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from sdrt.bundle import Bundle
from sdrt.engine import list_backends
from sdrt.engine.gpu import detect_gpus, free_memory
from sdrt.errors import BackendError, UsageError
from sdrt.progress import log_progress

from .peers import list_peers, prepare
from .report import Contestant, Run

log = logging.getLogger("sdrt.bench")
PARTS = ("text", "unet", "decode", "picture")
PEER_DTYPES = {"exact": "float32", "float32": "float32"}
PEER_DTYPES |= {"bfloat16": "bfloat16", "compiled": "bfloat16"}
WORKER = "from sdrt.bench.worker import main; main()"


def contestants(bundle: Bundle, compiled: bool) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can run, the reference library first, and why others are left out."""
    found, left_out = [], {}
    for name, (backend, precision, why_not) in list_peers(bundle, compiled).items():
        dtype = PEER_DTYPES.get(precision)
        if why_not is None:
            found.append(Contestant(name, backend, precision, dtype))
        else:
            left_out[name] = why_not
    for each in list_backends():
        if each.unavailable_reason is not None:
            left_out[each.title] = each.unavailable_reason
            continue
        computed = "float32" if each.device == "cpu" else None
        found.append(Contestant(each.title, each.backend, "exact", computed))
        if each.reduced_precision in bundle.manifest.admitted:
            lower = "bfloat16" if str(each.reduced_precision).endswith("bf16") else None
            found.append(Contestant(str(each.reduced_precision), each.backend, "auto", lower))
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
        each, gpus = self.contestant, detect_gpus().gpus
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


def loaded(each: Contestant, bundle: Bundle, run: Run, made: Path) -> Worker:
    """Its process, after its first picture; raises BackendError.

    made: an empty folder for what it reads in place of the bundle
    """
    prepare(each.backend, bundle, made)
    worker = Worker(each, bundle, run, made)
    try:
        with log_progress(lambda: f"starting {each.name}"):
            worker.load()
    except BaseException:
        worker.end()
        raise
    return worker
