"""How long do the documented installs take in an empty environment, and how much disk?

    python benchmarks/install.py [--trials wheel,clone,...] [--runs 3] [--save]

Every trial starts from a fresh clone of this commit in a temporary folder, with an empty SDRT_HOME
and nothing of this environment. Three are what a newcomer does:

- wheel: builds the wheel, installs it with `[cpu]` in an empty environment and draws an image
- clone: `make demo`, and in another clone `pip install '.[cpu]'`, to the image
- contributor: `make test-fast`

The extras (openvino, serve, build, ray, rtx) are installed once each. Where there are several runs,
the first trial is run once more and not counted, so that pip's cache is warm; times are medians: of
the clock, and of all the processors' work, which other programs on the machine hardly change. Needs
pip's index, 6 GB of disk and half an hour. `--save` saves after every trial, next to the others.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from results import FOLDER, save

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red circle on a blue background"
NO_TORCH = (
    "import importlib.util as u; assert not u.find_spec('torch') and not u.find_spec('diffusers')"
)
PYTHON = Path(sys.base_prefix) / "bin" / "python3"
Result = dict[str, float]


def cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Trial:
    """A clone of this commit, an empty environment and an empty SDRT_HOME in one folder."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.home, self.venv = folder / "sdrt", folder / "home", folder / "venv"
        self.start()
        self.run("git", "clone", "--quiet", str(ROOT), str(self.clone), cwd=folder)

    def run(self, *command: str, cwd: Path | None = None) -> float:
        """The seconds that a command takes, in the clone."""
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=cwd or self.clone, env=self.environment(), capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return time.perf_counter() - began

    def start(self) -> None:
        self.began, self.cpu = time.perf_counter(), cpu_seconds()

    def result(self, venv: Path, **parts: float) -> Result:
        """What it took since the start, and what it added to the environment on the disk."""
        total = {"seconds": time.perf_counter() - self.began, "cpu": cpu_seconds() - self.cpu}
        return {**parts, **total, "megabytes": megabytes(venv) - empty_megabytes()}

    def environment(self) -> dict[str, str]:
        """Without this environment's folder and settings."""
        own = {"VIRTUAL_ENV", "PYTHONPATH", "SDRT_HOME", "SDRT_TEST_CACHE", "MAKEFLAGS"}
        environment = {name: value for name, value in os.environ.items() if name not in own}
        parts = environment["PATH"].split(os.pathsep)
        environment["PATH"] = os.pathsep.join(part for part in parts if part != f"{sys.prefix}/bin")
        return environment | {"SDRT_HOME": str(self.home)}

    def install(self, *steps: str) -> float:
        """Create the environment and run pip on the requirements of each step."""
        seconds = self.run(str(PYTHON), "-m", "venv", str(self.venv))
        pip = str(self.venv / "bin" / "pip")
        return seconds + sum(self.run(pip, "install", "-q", *step.split()) for step in steps)

    def draw(self) -> float:
        """The first image: it also writes the bundle of `shapes`."""
        image = self.home / "circle.png"
        sdrt = str(self.venv / "bin" / "sdrt")
        seconds = self.run(sdrt, "run", PROMPT, "--seed", "0", "--output", str(image))
        if not image.is_file():
            sys.exit("no image was written")
        self.run(str(self.venv / "bin" / "python"), "-c", NO_TORCH)
        return seconds


@contextmanager
def new_trial() -> Iterator[Trial]:
    folder = Path(tempfile.mkdtemp(prefix="sdrt-install-"))
    try:
        yield Trial(folder)
    finally:
        shutil.rmtree(folder)


def megabytes(folder: Path) -> float:
    """What a folder takes on disk."""
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*") if not p.is_dir()) / 1e6


@cache
def empty_megabytes() -> float:
    """What an environment takes with nothing but its pip."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([PYTHON, "-m", "venv", folder], check=True)
        return megabytes(Path(folder))


def wheel() -> Result:
    """From the file of a wheel, as somebody gets it who has no clone."""
    with new_trial() as trial:
        trial.run(sys.executable, "-m", "build", "--wheel", "--no-isolation")
        (file,) = (trial.clone / "dist").glob("*.whl")
        trial.start()
        return trial.result(trial.venv, install=trial.install(f"{file}[cpu]"), image=trial.draw())


def clone() -> Result:
    """`git clone` and `pip install '.[cpu]'`, to the image."""
    with new_trial() as trial:
        return trial.result(trial.venv, install=trial.install(".[cpu]"), image=trial.draw())


def demo() -> Result:
    """`git clone` and `make demo`, to the image."""
    with new_trial() as trial:
        trial.run("make", "demo", f"PYTHON={PYTHON}")
        if not (trial.clone / "out" / "demo.png").is_file():
            sys.exit("make demo wrote no image")
        return trial.result(trial.clone / ".venv")


def contributor() -> Result:
    """`git clone` and `make test-fast`, until its tests have passed."""
    with new_trial() as trial:
        install = trial.run("make", ".venv/.ready", f"PYTHON={PYTHON}")
        tests = trial.run("make", "test-fast", f"PYTHON={PYTHON}")
        return trial.result(trial.clone / ".venv", install=install, tests=tests)


def extra(*steps: str) -> Callable[[], Result]:
    """What `pip install` of extras takes, a step after the other."""

    def measure() -> Result:
        with new_trial() as trial:
            trial.install(*steps)
            return trial.result(trial.venv)

    return measure


TRIALS: dict[str, tuple[str, Callable[[], Result]]] = {
    "wheel": ("`pip install 'FILE.whl[cpu]'`, to the image", wheel),
    "clone": ("`git clone`, `pip install '.[cpu]'`, to the image", clone),
    "demo": ("`git clone`, `make demo`, to the image", demo),
    "contributor": ("`git clone`, `make test-fast`", contributor),
    "openvino": ("`pip install '.[cpu,openvino]'`", extra(".[cpu,openvino]")),
    "serve": ("`pip install '.[cpu,serve]'`", extra(".[cpu,serve]")),
    "build": (
        "CPU torch, then `pip install '.[build,cpu]'`",
        extra("torch -c constraints.txt", ".[build,cpu]"),
    ),
    "ray": ("`pip install '.[cpu,ray]'`", extra(".[cpu,ray]")),
    "rtx": ("`pip install '.[rtx]'`", extra(".[rtx]")),
}
NEWCOMERS = ("wheel", "clone", "demo")


def measure(name: str, runs: int) -> dict[str, Any]:
    """Medians over the runs of a trial, and the load of the machine before each."""
    runs = runs if name in NEWCOMERS else 1
    loads, results = [], []
    for _ in range(runs):
        loads.append(round(os.getloadavg()[0], 1))
        results.append(TRIALS[name][1]())
        print(f"{name:12} load {loads[-1]:4.1f}  {results[-1]}", flush=True)
    medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
    return {"medians": medians, "runs": results, "loads": loads}


def claim(figures: dict[str, Any]) -> str:
    """`31 s (install 28 s, image 3 s), 20 s of CPU, +220 MB; median of 3, load 1.2 to 2.4`."""
    medians, loads = dict(figures["medians"]), figures["loads"]
    seconds, cpu, size = (medians.pop(key) for key in ("seconds", "cpu", "megabytes"))
    parts = ", ".join(f"{key} {value:.0f} s" for key, value in medians.items())
    disk = f"+{size / 1e3:.1f} GB" if size >= 1e3 else f"+{size:.0f} MB"
    load = f"{min(loads)}" if min(loads) == max(loads) else f"{min(loads)} to {max(loads)}"
    runs = f"median of {len(loads)}" if len(loads) > 1 else "one run"
    time = f"{seconds:.0f} s{f' ({parts})' if parts else ''}, {cpu:.0f} s of CPU"
    return f"{time}, {disk}; {runs}, load {load}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", default=",".join(TRIALS), help="default: all")
    parser.add_argument("--runs", type=int, default=3, help="of wheel, clone and demo")
    parser.add_argument("--save", action="store_true", help="keep the figures for the pages")
    args = parser.parse_args()
    names = args.trials.split(",")
    if args.runs > 1:
        TRIALS[names[0]][1]()  # warms pip's cache
    path = FOLDER / "install.json"
    figures: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}
    for name in names:
        figures[name] = measure(name, args.runs)
        claims = {TRIALS[key][0]: claim(figures[key]) for key in TRIALS if key in figures}
        if args.save:
            save("install", claims, figures)
    print(json.dumps(claims, indent=2))


if __name__ == "__main__":
    main()
