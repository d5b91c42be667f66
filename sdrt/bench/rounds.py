"""The contestants of a benchmark, their processes, and their measurements.

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

from .peers import LEFT_OUT, list_peers, prepare
from .report import BenchSettings, Contestant

log = logging.getLogger("sdrt.bench")
PARTS = ("text", "unet", "decode", "picture")
PEER_DTYPES = {"exact": "float32", "float32": "float32"}
PEER_DTYPES |= {"bfloat16": "bfloat16", "compiled": "bfloat16"}
WORKER = "from sdrt.bench.worker import main; main()"


def list_contestants(
    bundle: Bundle, compiled: bool = False, exact: bool = False
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants that can run, diffusers first, and why the others cannot.

    compiled: with a compiled diffusers
    exact: none in a lower precision than the bundle's
    """
    runnable, left_out = [], {}
    for name, (backend, precision, why_not) in list_peers(bundle, compiled, exact).items():
        dtype = PEER_DTYPES.get(precision)
        if why_not is None:
            runnable.append(Contestant(name, backend, precision, dtype))
        else:
            left_out[name] = why_not
    for candidate in list_backends():
        if candidate.unavailable_reason is not None:
            left_out[candidate.title] = candidate.unavailable_reason
            continue
        computed = "float32" if candidate.device == "cpu" else None
        runnable.append(Contestant(candidate.title, candidate.backend, "exact", computed))
        if candidate.reduced_precision in bundle.manifest.admitted and exact:
            left_out[str(candidate.reduced_precision)] = LEFT_OUT
        elif candidate.reduced_precision in bundle.manifest.admitted:
            lower = "bfloat16" if str(candidate.reduced_precision).endswith("bf16") else None
            name = str(candidate.reduced_precision)
            runnable.append(Contestant(name, candidate.backend, "auto", lower))
        if candidate.backend == "openvino":
            last = runnable[-1]
            name = "OpenVINO static bf16" if last.precision == "auto" else "OpenVINO static"
            runnable.append(Contestant(name, "openvino", last.precision, last.dtype, static=True))
    return runnable, left_out


def select_contestants(runnable: list[Contestant], names: str | None) -> list[Contestant]:
    """The contestants whose names contain one of these, separated by commas; all for None."""
    if names is None:
        return runnable
    requested = [name.strip() for name in names.split(",") if name.strip()]
    for name in requested:
        if not any(name in contestant.name for contestant in runnable):
            have = ", ".join(contestant.name for contestant in runnable)
            raise UsageError(f"unknown engine {name!r}; available: {have}")
    return [
        contestant for contestant in runnable if any(name in contestant.name for name in requested)
    ]


class Worker:
    """A contestant's process; raises BackendError with its last output if it exits early."""

    def __init__(
        self, contestant: Contestant, bundle: Bundle, run: BenchSettings, folder: Path
    ) -> None:
        job: dict[str, Any] = {"backend": contestant.backend, "precision": contestant.precision}
        job |= {"folder": str(bundle.folder), "size": run.size, "steps": run.steps}
        job |= {"scheduler": run.scheduler, "made": str(folder), "static": contestant.static}
        self.contestant, self.parts = contestant, list[str]()
        self._stderr: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def load(self) -> None:
        """Wait for its first image."""
        contestant, gpus = self.contestant, detect_gpus().gpus
        free = free_memory(gpus[0]) if gpus else None
        answer = self.answer()
        contestant.cold_start_seconds = time.perf_counter() - self._began
        contestant.load_seconds, self.parts = answer["load_seconds"], answer["parts"]
        if free is not None and (left := free_memory(gpus[0])) is not None:
            contestant.device_bytes = free - left

    @property
    def process_id(self) -> int:
        return self._process.pid

    def measure(self, part: str) -> dict[str, Any]:
        """Measure a part, and store the measurement with the contestant."""
        measurement = self.ask(part)
        self.contestant.turns.setdefault(part, []).append(measurement)
        return measurement

    def ask(self, part: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{part}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` reports why
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._stderr.seek(0)
        lines = [text.strip() for text in self._stderr if text.strip()] or ["no output"]
        raise BackendError(f"{self.contestant.name} exited during the benchmark: {lines[-1]}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()


def start_worker(
    contestant: Contestant, bundle: Bundle, run: BenchSettings, folder: Path
) -> Worker:
    """Start a contestant's process and wait for its first image; raises BackendError.

    folder: an empty folder for what it reads in place of the bundle
    """
    prepare(contestant.backend, bundle, folder)
    worker = Worker(contestant, bundle, run, folder)
    try:
        with log_progress(lambda: f"starting {contestant.name}"):
            worker.load()
    except BaseException:
        worker.kill()
        raise
    return worker
