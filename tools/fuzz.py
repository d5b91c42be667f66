"""`make fuzz`: coverage-guided executions of the parsers of untrusted input.

    python tools/fuzz.py [TARGET ..] [--executions 10_000_000] [--save]

Each target of tools/fuzz_targets.py runs in a process of its own under atheris, from the inputs in
`tests/corpus/<target>`. What crashes, hangs for more than 5 seconds or takes more memory than
twice the input and a constant is kept there, and the command fails; the tests replay what is kept.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mutating import mutated

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "corpus"
HANG = 5  # seconds
CONSTANT = 64  # MB above what a process has taken after its first inputs; the fuzzer's own is in it
LARGEST = {"image": 8192 * 8192 * 4 / 1e6}  # MB more: an image of the most pixels that are read
# Executions of one process: the inputs that the fuzzer finds new stay in its memory.
PIECE = 200_000
FINDINGS = ("crash-*", "timeout-*", "oom-*")


@dataclass(slots=True)
class Result:
    """What a target's executions came to. grown: MB from the first inputs to the end, at most."""

    target: str
    executions: int
    seconds: float
    grown: float
    findings: list[str]

    @property
    def failed(self) -> bool:
        return bool(self.findings) or self.grown > CONSTANT + LARGEST.get(self.target, 0)


def worker(name: str, arguments: list[str]) -> None:
    """This process as the fuzzer of one target; does not return."""
    import atheris

    with atheris.instrument_imports(include=["sdrt"]):
        import fuzz_targets
    fuzz_targets.quiet()
    rng = random.Random(0)

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, longest))
        rng.seed(seed)
        return mutated(data, rng, longest)

    atheris.Setup(
        [sys.argv[0], *arguments],
        lambda data: fuzz_targets.execute(name, data),
        custom_mutator=mutator,
    )
    atheris.Fuzz()


def fuzzed(name: str, longest: int, runs: int, work: Path) -> Result:
    """One target, a process for each piece; `work` keeps what each finds new."""
    cached = CORPUS / name
    cached.mkdir(parents=True, exist_ok=True)
    options = [f"-max_len={longest}", f"-timeout={HANG}", f"-artifact_prefix={cached}/"]
    options += ["-print_final_stats=1", "-rss_limit_mb=4096", "-verbosity=0", "-close_fd_mask=1"]
    before, result = found_in(cached), Result(name, 0, 0.0, 0.0, [])
    (work / name).mkdir()
    first, _, _ = ran(name, [*options, "-runs=2000"], [work / name, cached], work)
    for piece in range(-(-runs // PIECE)):
        fresh = work / f"{name}-{piece}"
        fresh.mkdir()
        count = min(PIECE, runs - piece * PIECE)
        began = time.monotonic()
        peak, printed, code = ran(
            name, [*options, f"-runs={count}", f"-seed={piece + 1}"], [fresh, cached], work
        )
        result.seconds = round(result.seconds + time.monotonic() - began, 1)
        result.grown = max(result.grown, round((peak - first) / 1e6, 1))
        if match := re.search(r"number_of_executed_units: *(\d+)", printed):
            result.executions += int(match[1])
        if code:
            print(printed[-1500:], file=sys.stderr)
            new = sorted(found_in(cached) - before)
            result.findings = new or [f"exit code {code}"]
            break
    return result


def found_in(folder: Path) -> set[str]:
    return {path.name for pattern in FINDINGS for path in folder.glob(pattern)}


def ran(name: str, options: list[str], corpora: list[Path], work: Path) -> tuple[int, str, int]:
    """Peak of resident memory in bytes, what was printed, and the exit code."""
    command = [sys.executable, __file__, "--worker", name, *options, *map(str, corpora)]
    environment = {**os.environ, "TMPDIR": str(work), "OMP_NUM_THREADS": "1"}
    with (work / "printed").open("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        return usage.ru_maxrss * 1024, printed.read(), process.returncode


def keep(results: list[Result]) -> None:
    """Into the results; the kept ones of targets that did not run now stay."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from results import FOLDER, save

    path = FOLDER / "fuzz.json"
    cached = json.loads(path.read_text())["figures"]["targets"] if path.exists() else []
    new = {result.target for result in results}
    every = [Result(**item) for item in cached if item["target"] not in new] + results
    total, seconds = sum(r.executions for r in every), sum(r.seconds for r in every)
    failed = sum(len(r.findings) or r.failed for r in every)
    claim = f"{total:,} executions of {len(every)} targets in {seconds / 60:.0f} minutes: "
    claim += f"{failed} crashes, hangs or memory beyond bounds"
    save(
        "fuzz",
        {"fuzzing the parsers of untrusted input": claim},
        {"targets": [asdict(r) for r in every]},
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--executions", type=int, default=10_000_000, help="of all targets")
    parser.add_argument("--save", action="store_true", help="keep the results for the README")
    args = parser.parse_args()
    results = []
    work = Path(tempfile.mkdtemp(prefix="sdrt-fuzz-"))
    try:
        for name in args.targets or TARGETS:
            _, fraction, longest = TARGETS[name]
            results.append(fuzzed(name, longest, int(args.executions * fraction), work))
            print(json.dumps(asdict(results[-1])), flush=True)
    finally:
        shutil.rmtree(work)
    print(f"{sum(result.executions for result in results):,} executions")
    if args.save:
        keep(results)
    sys.exit(any(result.failed for result in results))


if __name__ == "__main__":
    main()
