"""Stable Diffusion on this machine's GPU, with every engine that runs here, in one run.

    python benchmarks/gpu.py [--parts A,B] [--rows 1,2,8] [--sizes 512x512] [--steps 20,50]
                             [--engines A,B] [--seconds 90] [--rounds 20]
                             [--device cuda|cpu] [--model full|shapes] [--work FOLDER] [--out FILE]

By default full-size Stable Diffusion 1.5 in fp16 with random weights: speed does not depend on
their values. Engines are this project's on TensorRT, torch (node by node and compiled, each with
and without CUDA graphs) and ONNX Runtime (with and without fused operators), and diffusers, plain
and compiled. Each lives in a process of its own, which is stopped after `--seconds`; what it had
measured by then counts, and `--out` is written after every engine. Measured are the text encoder,
the UNet by rows, decoding, images with guidance, load, memory and the time from a process's start
to its first image, next to what the GPU reaches in a large product and a large copy.

`--device cpu --model shapes` runs the same code on the embedded model, to try it; its figures mean
nothing. Not yet run on a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from gpu_contestants import (
    PARTS,
    Selection,
    explain_missing,
    load_parts,
    measure_ceilings,
)
from published import made_bundle
from results import FOLDER, save

from sdrt.engine.gpu import detect_gpus, free_memory

WARM_UP = 3  # calls that are not counted
CEILINGS = "ceilings"


def work(args: argparse.Namespace) -> None:
    """A worker: loads, says how long that took, then times what its standard input names."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    if args.worker == CEILINGS:
        return answer(answers, measure_ceilings(args.device))
    began = time.perf_counter()
    paths = args.work / "bundle", args.work / "model"
    parts = load_parts(args.worker, *paths, args.device, selection_of(args))
    answer(answers, {"load": time.perf_counter() - began, "parts": list(parts)})
    for line in sys.stdin:
        began = time.perf_counter()
        parts[line.strip()]()
        answer(answers, time.perf_counter() - began)


def answer(stream: TextIO, value: object) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def selection_of(args: argparse.Namespace) -> Selection:
    return Selection(
        tuple(args.parts.split(",")),
        tuple(args.sizes.split(",")),
        tuple(int(n) for n in args.rows.split(",")),
        tuple(int(n) for n in args.steps.split(",")),
    )


class Worker:
    """A process with one engine, ended after so many seconds."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", name, "--work", str(args.work)]
        for option in ("device", "parts", "sizes", "rows", "steps"):
            command += [f"--{option}", getattr(args, option)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.late = False
        self._timer = threading.Timer(args.seconds, self._end)
        self._timer.start()

    def _end(self) -> None:
        self.late = True
        self.process.kill()

    def ask(self, part: str) -> float:
        """Seconds of a part's call; raises EOFError where the worker ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{part}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EOFError from None
        return float(self.read())

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def close(self) -> str:
        """End it; returns how it ended."""
        self._timer.cancel()
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        return "out of time" if self.late else f"ended with {code}"


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One engine's figures; `failed` says why some are missing."""
    gpu = detect_gpus().gpus[0] if args.device == "cuda" else None
    before = free_memory(gpu) if gpu else None
    began, deadline = time.perf_counter(), time.perf_counter() + args.seconds
    worker, actual = Worker(name, args), dict[str, Any](parts={})
    try:
        started = worker.read()
        actual["load"] = started["load"]
        if images := [part for part in started["parts"] if part.startswith("picture")]:
            worker.ask(images[0])
            actual["cold start"] = time.perf_counter() - began
        for i, part in enumerate(started["parts"]):
            actual["parts"][part] = {"first": worker.ask(part)}
            left = (deadline - time.perf_counter()) / (len(started["parts"]) - i)
            actual["parts"][part] |= repeat(worker, part, args.rounds, left)
        if gpu and before is not None and (left_bytes := free_memory(gpu)) is not None:
            actual["bytes"] = before - left_bytes
    except EOFError:
        worker.process.wait()
        actual["failed"] = worker.close()
    finally:
        worker.close()
    return actual


def repeat(worker: Worker, part: str, rounds: int, seconds: float) -> dict[str, float]:
    """Median and 99th percentile of the calls that fit into half of the time left for a part."""
    until, times = time.perf_counter() + seconds / 2, list[float]()
    for _ in range(rounds + WARM_UP - 1):
        times.append(worker.ask(part))
        if time.perf_counter() > until and len(times) >= WARM_UP:
            break
    counted = times[WARM_UP - 1 :] or times[-1:]
    low, high = np.percentile(counted, [50, 99]).tolist()
    return {"p50": low, "p99": high, "calls": len(counted)}


def text_of(actual: dict[str, dict[str, Any]]) -> str:
    """A table: parts down, engines across; milliseconds, median and 99th percentile."""
    good = {name: figures for name, figures in actual.items() if figures.get("parts")}
    parts = list(dict.fromkeys(part for figures in good.values() for part in figures["parts"]))
    lines = ["| ms: p50 (p99) | " + " | ".join(good) + " |", "|---" * (len(good) + 1) + "|"]
    for part in parts:
        cells = []
        for figures in good.values():
            value = figures["parts"].get(part, {})
            timed = "p50" in value
            cells.append(f"{value['p50'] * 1e3:.1f} ({value['p99'] * 1e3:.1f})" if timed else "–")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    for key, scale in (("load", 1.0), ("cold start", 1.0), ("bytes", 1e-9)):
        unit = "GPU memory, GB" if key == "bytes" else f"{key}, s"
        values = (f"{f[key] * scale:.2f}" if key in f else "–" for f in good.values())
        lines.append(f"| {unit} | " + " | ".join(values) + " |")
    failed = [f"{name}: {f['failed']}" for name, f in actual.items() if "failed" in f]
    return "\n".join([*lines, *failed])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all")
    parser.add_argument("--sizes", default="512x512")
    parser.add_argument("--rows", default="1,2,4,8,16", help="of UNet calls; default: 1,2,4,8,16")
    parser.add_argument("--steps", default="20,50", help="of images; default: 20,50")
    parser.add_argument("--rounds", type=int, default=20, help="at most; default: 20")
    parser.add_argument("--seconds", type=float, default=90, help="for each engine; default: 90")
    parser.add_argument("--engines", help="only these, by name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=("full", "shapes"), default="full")
    parser.add_argument("--work", type=Path, help="where the model and the bundle are kept")
    parser.add_argument("--out", type=Path, help="JSON, written after every engine")
    parser.add_argument("--save", action="store_true", help="keep the figures in the repository")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> float:
    """Make the model and the bundle unless they are there; returns the seconds that it took."""
    began = time.perf_counter()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.model == "shapes":
        from sdrt.bundle.embedded import materialize
        from sdrt.export.checkpoint import embedded_checkpoint

        for name, path in (
            ("model", embedded_checkpoint("shapes")),
            ("bundle", materialize("shapes", args.work / "embedded")),
        ):
            if not (args.work / name).exists():
                (args.work / name).symlink_to(path.resolve())
        return time.perf_counter() - began
    batch = f"1:1:{max(max(selection_of(args).rows) // 2, 1)}"
    made_bundle(args.work, args.sizes.split(","), "--fp16", "--batch", batch)
    return time.perf_counter() - began


def choose(args: argparse.Namespace) -> list[str]:
    """The contestants that run here, of those that are asked for; says why others do not."""
    reasons = explain_missing(args.device)
    asked = args.engines.split(",") if args.engines else list(reasons)
    if unknown := set(asked) - set(reasons):
        sys.exit(f"gpu.py: no engine {', '.join(sorted(unknown))}; expected {', '.join(reasons)}")
    for name in asked:
        if reasons[name]:
            print(f"{name}: skipped: {reasons[name]}", file=sys.stderr)
    return [name for name in asked if not reasons[name]]


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args)
    if args.device == "cuda" and (reason := detect_gpus().unavailable_reason):
        sys.exit(f"gpu.py: {reason}; this benchmark needs one, or --device cpu --model shapes")
    chosen = choose(args)
    with tempfile.TemporaryDirectory() as temporary:
        args.work = (args.work or Path(temporary)).absolute()
        figures: dict[str, Any] = {"bundle seconds": prepare(args), "engines": {}}
        figures |= describe_gpu(args)
        figures["ceilings"] = ceilings(args)
        for name in chosen:
            figures["engines"][name] = measure(name, args)
            if args.out:
                args.out.write_text(json.dumps(figures, indent=2) + "\n")
            print(f"{name}: {figures['engines'][name].get('failed', 'done')}", file=sys.stderr)
    print(text_of(figures["engines"]))
    print(json.dumps(figures["ceilings"]))
    done = [name for name, of in figures["engines"].items() if of["parts"]]
    print(f"measured {', '.join(done) or 'nothing'}, of {len(chosen)} that run here")
    if args.save and args.device == "cuda":
        gpu = detect_gpus().gpus[0]
        save(f"gpu_{gpu.sm}", claims_of(gpu.name, figures["engines"]), figures)
        draw(figures["engines"], gpu.name, FOLDER / f"gpu_{gpu.sm}.svg")
    if not done:
        sys.exit(1)


def describe_gpu(args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cpu":
        return {"gpu": None}
    inventory = detect_gpus()
    return {"gpu": inventory.gpus[0].name, "driver": inventory.driver_version}


def ceilings(args: argparse.Namespace) -> dict[str, Any]:
    worker = Worker(CEILINGS, args)
    try:
        return dict(worker.read())
    except EOFError:
        worker.process.wait()
        return {"failed": worker.close()}
    finally:
        worker.close()


def draw(actual: dict[str, dict[str, Any]], gpu: str, out: Path) -> None:
    """Bars of whole images, and of the UNet by rows, every engine in its colour."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sdrt"
    from matplotlib import pyplot

    good = {
        name: {part: at for part, at in figures.get("parts", {}).items() if "p50" in at}
        for name, figures in actual.items()
    }
    every = dict.fromkeys(part for parts in good.values() for part in parts)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5))
    for axis, kind in zip(axes, ("picture", "UNet"), strict=True):
        titles = [p for p in every if p.startswith(kind) and "step by step" not in p]
        for i, (name, parts) in enumerate(good.items()):
            places = [at + (i + 0.5) / len(good) * 0.8 for at, t in enumerate(titles) if t in parts]
            times = [parts[title]["p50"] * 1e3 for title in titles if title in parts]
            axis.barh(places, times, height=0.8 / len(good), label=name)
        axis.set_yticks([at + 0.4 for at in range(len(titles))], titles, fontsize=7)
        axis.set_xscale("log")
        axis.set_xlabel("milliseconds, median")
        axis.invert_yaxis()
    axes[0].set_title(gpu)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def claims_of(gpu: str, actual: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the README says of the whole images."""
    return {
        f"{gpu}, {part}, {name}": f"{at['p50'] * 1e3:.1f} ms, 99 % within {at['p99'] * 1e3:.1f}"
        for name, figures in actual.items()
        for part, at in figures.get("parts", {}).items()
        if part.startswith("picture") and "p50" in at
    }


if __name__ == "__main__":
    main()
