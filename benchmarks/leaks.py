"""Does a process grow by the images it makes, the pipelines it opens, the LoRA files it changes?

    python benchmarks/leaks.py [--images 10000] [--cycles 1000] [--switches 500] [--save]

Resident memory, open files and threads are read after every few repetitions. Growth is the slope of
a line through the means of ten chunks after the first fifth, with its 95 % interval: memory read
close together is not independent. It is a leak if the interval lies above zero altogether and the
slope is 10 bytes or more. What the allocator keeps is given back before each reading
(`malloc_trim`), so that what is left is held by somebody.
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from lora_switch import write_lora
from results import save

import sdrt
from sdrt.bundle import open_bundle

SEGMENTS = 10
T_95 = 2.306  # Student's, of 8 degrees of freedom
SAMPLES = 200
LEAST = 10.0  # bytes a repetition


@dataclass(frozen=True, slots=True)
class Growth:
    """bytes: by which a repetition grows the process. within: half the 95 % interval."""

    repetitions: int
    seconds: float
    bytes: float
    within: float
    megabytes: list[float]
    files: tuple[int, int]
    threads: tuple[int, int]

    @property
    def leaks(self) -> bool:
        grows = self.bytes >= LEAST and self.bytes > self.within
        return grows or self.files[1] > self.files[0] or self.threads[1] > self.threads[0]

    def __str__(self) -> str:
        flat = self.files[0] == self.files[1] and self.threads[0] == self.threads[1]
        rest = "files and threads flat" if flat else f"files {self.files}, threads {self.threads}"
        return f"{self.bytes:.0f} ± {self.within:.0f} bytes each, {rest}"


def readings() -> tuple[int, int, int]:
    """Resident bytes, open files, threads of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    count = (sum(1 for _ in Path(f"/proc/self/{kind}").iterdir()) for kind in ("fd", "task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), *count


def growth(count: int, repeat: Callable[[int], object]) -> Growth:
    """Repeat so many times, reading in between."""
    every = max(1, count // SAMPLES)
    gc.freeze()  # what is there already is not gone through at every reading
    began, taken = time.monotonic(), []
    for i in range(count):
        repeat(i)
        if i % every == 0:
            taken.append((i, *readings()))
    seconds = time.monotonic() - began
    gc.unfreeze()
    cached = np.array(taken[len(taken) // 5 :], np.float64)
    slope, within = line_through(cached[:, 0], cached[:, 1])
    bounds = [(int(cached[0, k]), int(cached[-1, k])) for k in (2, 3)]
    shown = [round(sample[1] / 1e6, 2) for sample in taken[:: max(1, len(taken) // 20)]]
    return Growth(count, round(seconds, 1), slope, within, shown, bounds[0], bounds[1])


def line_through(at: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Slope and half its 95 % interval, through the means of ten chunks."""
    x = np.array([part.mean() for part in np.array_split(at, SEGMENTS)])
    y = np.array([part.mean() for part in np.array_split(sizes, SEGMENTS)])
    x -= x.mean()
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    error = float(np.sqrt(residual @ residual / (SEGMENTS - 2) / (x @ x)))
    return slope, T_95 * error


def measured(args: argparse.Namespace) -> dict[str, Growth]:
    folder = open_bundle(args.bundle).folder
    actual = {}

    def image(i: int) -> None:
        pipe(f"a red circle {i}", num_inference_steps=1 + i % 2, seed=i)

    def cycle(i: int) -> None:
        with sdrt.load(folder, backend=args.backend) as opened:
            opened("a red circle", num_inference_steps=1, seed=i)

    with sdrt.load(folder, backend=args.backend) as pipe:
        actual["images"] = growth(args.images, image)
        print(f"images: {actual['images']}", flush=True)
        with tempfile.TemporaryDirectory() as work:
            files = [Path(work) / "a.safetensors", Path(work) / "b.safetensors"]
            for seed, file in enumerate(files):
                write_lora(folder, file, seed)
            actual["switches"] = growth(
                args.switches, lambda i: pipe.set_lora({files[i % 2]: 0.8} if i % 3 else {})
            )
        print(f"switches: {actual['switches']}", flush=True)
    actual["cycles"] = growth(args.cycles, cycle)
    print(f"cycles: {actual['cycles']}", flush=True)
    return actual


NAMES = {
    "images": "{:,} images in one process",
    "switches": "{:,} switches of LoRA files",
    "cycles": "{:,} pipelines loaded, used and closed",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="shapes")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--cycles", type=int, default=1_000)
    parser.add_argument("--switches", type=int, default=500)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    actual = measured(args)
    if args.save:
        claims = {NAMES[k].format(g.repetitions) + ", growth": str(g) for k, g in actual.items()}
        save("leaks", claims, {name: asdict(item) for name, item in actual.items()})
    sys.exit(any(item.leaks for item in actual.values()))


if __name__ == "__main__":
    main()
