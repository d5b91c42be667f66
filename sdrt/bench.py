"""`sdrt bench`: one bundle on every engine that works here, next to the reference library if there.

Every engine lives in a process of its own, so that its memory is its own, and they take turns, so
that a machine that drifts favours none; ratios are taken turn by turn.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import load
from .bundle import Bundle, open_bundle, parse_size
from .engine import candidates
from .engine.choose import installed
from .errors import BackendError, UsageError

PROMPT = "a red circle on a blue background"
REFERENCE = "reference library, fp32"
Part = Callable[[], object]


@dataclass(slots=True)
class Engine:
    """One contestant: its name, the arguments of its worker and what was measured, in seconds."""

    name: str
    backend: str
    precision: str
    load_seconds: float = 0.0
    peak_bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)


def contestants(bundle: Bundle) -> list[Engine]:
    """The reference library first, where it and the checkpoint's folder are there."""
    found = []
    paired = "text_encoder_2" in bundle.manifest.components  # not measured here
    if installed("diffusers") and checkpoint_folder(bundle) and not paired:
        found.append(Engine(REFERENCE, "reference", "exact"))
    for candidate in candidates():
        if candidate.why_not is None:
            found.append(Engine(candidate.title, candidate.backend, "exact"))
            if candidate.reduced in bundle.manifest.admitted:
                found.append(Engine(str(candidate.reduced), candidate.backend, "auto"))
    return found


def checkpoint_folder(bundle: Bundle) -> Path | None:
    """Where the bundle's checkpoint lies, if it is a folder that the reference library reads."""
    source = bundle.manifest.source
    shipped = Path(__file__).parent / "models" / source
    for folder in (shipped, Path(source).expanduser()):
        if (folder / "model_index.json").is_file():
            return folder
    return None


def bench(args: argparse.Namespace) -> None:
    """Prints a table, or JSON."""
    bundle = open_bundle(args.bundle)
    if "text_encoder" not in bundle.manifest.components:
        raise UsageError(f"{bundle.manifest.name} takes no prompt; bench measures models that do")
    width, height = parse_size(args.size) if args.size else bundle.manifest.sizes[0]
    if not 1 <= args.rounds <= 1000 or not 1 <= args.steps <= 1000:
        raise UsageError(f"{args.rounds} rounds of {args.steps} steps; expected 1 to 1000 of each")
    engines = contestants(bundle)
    workers = [_started(engine, bundle, f"{width}x{height}", args.steps) for engine in engines]
    try:
        for engine, worker in zip(engines, workers, strict=True):
            engine.load_seconds = float(_answer(worker, engine))
            print(f"{engine.name}: loaded in {engine.load_seconds:.2f} s", file=sys.stderr)
        for _ in range(args.rounds):
            for part in PARTS:
                for engine, worker in zip(engines, workers, strict=True):
                    answer = _ask(worker, engine, part)
                    if answer != "none":
                        engine.seconds.setdefault(part, []).append(float(answer))
        for engine, worker in zip(engines, workers, strict=True):
            engine.peak_bytes = int(_ask(worker, engine, "end")) * 1024
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    report = {
        "bundle": bundle.manifest.name,
        "size": f"{width}x{height}",
        "steps": args.steps,
        "rounds": args.rounds,
        "engines": [described(engine, engines[0]) for engine in engines],
    }
    print(json.dumps(report, indent=2) if args.json else text_from_report(report))


PARTS = ("text", "unet", "decode", "picture")


def _started(engine: Engine, bundle: Bundle, size: str, steps: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "sdrt.bench", engine.backend, engine.precision]
    return subprocess.Popen(
        [*command, str(bundle.folder), size, str(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _ask(worker: "subprocess.Popen[str]", engine: Engine, part: str) -> str:
    assert worker.stdin is not None
    worker.stdin.write(f"{part}\n")
    worker.stdin.flush()
    return _answer(worker, engine)


def _answer(worker: "subprocess.Popen[str]", engine: Engine) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline().strip()
    if not line:
        raise BackendError(
            f"{engine.name} stopped while it was measured; try sdrt run --backend {engine.backend}"
        )
    return line


def described(engine: Engine, base: Engine) -> dict[str, Any]:
    """One engine's figures: percentiles in seconds, and how many times faster than the base."""
    parts: dict[str, Any] = {}
    for part, seconds in engine.seconds.items():
        low, high = np.percentile(seconds, [50, 90]).tolist()
        parts[part] = {"p50": low, "p90": high, "p99": float(np.percentile(seconds, 99))}
        if part in base.seconds:
            pairs = zip(base.seconds[part], seconds, strict=True)
            parts[part]["times_faster"] = statistics.median(b / own for b, own in pairs)
    return {
        "name": engine.name,
        "load_seconds": engine.load_seconds,
        "peak_bytes": engine.peak_bytes,
        "parts": parts,
    }


def text_from_report(report: dict[str, Any]) -> str:
    lines = [
        f"{report['bundle']} at {report['size']}, {report['rounds']} rounds; milliseconds, median "
        f"and 90th percentile; × is against the first row, turn by turn",
        f"{'':26}{'text':>14}{'UNet, 2 rows':>16}{'×':>6}{'decode':>15}{'×':>6}"
        f"{str(report['steps']) + ' steps':>16}{'×':>6}{'load s':>8}{'peak MB':>9}",
    ]
    for engine in report["engines"]:
        cells = [f"{engine['name']:26}"]
        for part, width in (("text", 14), ("unet", 16), ("decode", 15), ("picture", 16)):
            found = engine["parts"].get(part)
            both = f"{found['p50'] * 1e3:.1f} {found['p90'] * 1e3:.1f}" if found else "–"
            cells.append(f"{both:>{width}}")
            if part != "text":
                times = found.get("times_faster") if found else None
                cells.append(f"{times:6.2f}" if times else f"{'–':>6}")
        cells.append(f"{engine['load_seconds']:8.2f}{engine['peak_bytes'] / 1e6:9.0f}")
        lines.append("".join(cells))
    return "\n".join(lines)


def _own(backend: str, precision: str, folder: str, size: str, steps: int) -> dict[str, Part]:
    pipe = load(folder, backend=backend, precision=precision)
    width, height = parse_size(size)
    down, specs = pipe.manifest.downscale, pipe.manifest.components["unet"].inputs
    shapes = {spec.name: spec.shape for spec in specs}
    rng = np.random.default_rng(0)
    rows = (2, int(shapes["sample"][1]), height // down, width // down)
    sample = rng.normal(size=rows).astype(np.float32)
    context = rng.normal(size=(2, pipe.manifest.max_tokens, int(shapes["context"][2])))
    feeds = {
        "sample": sample,
        "timestep": np.full(2, 500, np.float32),
        "context": context.astype(np.float32),
    }
    for name in set(shapes) - set(feeds):
        feeds[name] = np.ones((2, int(shapes[name][1])), np.float32)
    latents = {"latents": sample[:1, : pipe.manifest.latent_channels]}
    texts = [(e.engine, {"input_ids": e.tokenizer(["", PROMPT])}) for e in pipe.text_encoders]

    def picture() -> object:
        pipe.known.clear()
        return pipe(PROMPT, num_inference_steps=steps, size=size, seed=0)

    parts: dict[str, Part] = {
        "text": lambda: [encoder(ids) for encoder, ids in texts],
        "unet": lambda: pipe.engines["unet"](feeds),
        "decode": lambda: pipe.engines["vae_decoder"](latents),
    }
    return parts | ({"picture": picture} if rows[1] == pipe.manifest.latent_channels else {})


def _reference(folder: str, size: str, steps: int) -> dict[str, Part]:
    import diffusers
    import torch

    kind: Any = diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(checkpoint_folder(open_bundle(folder)))
    pipe.to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    width, height = parse_size(size)
    latents = torch.randn(2, 4, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    ids = pipe.tokenizer(
        ["", PROMPT], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    context = pipe.text_encoder(ids)[0]

    def guarded(part: Part) -> Part:
        def run() -> object:
            with torch.no_grad():
                return part()

        return run

    arguments: dict[str, Any] = {"num_inference_steps": steps, "width": width, "height": height}
    parts: dict[str, Part] = {
        "text": lambda: pipe.text_encoder(ids),
        "unet": lambda: pipe.unet(latents, torch.tensor([500.0, 500.0]), context),
        "decode": lambda: pipe.vae.decode(latents[:1] / pipe.vae.config.scaling_factor),
        "picture": lambda: pipe(PROMPT, **arguments),
    }
    return {name: guarded(part) for name, part in parts.items()}


def work(arguments: list[str]) -> None:
    """A worker: loads, warms, says how long loading took, then times what it is asked for."""
    backend, precision, folder, size, steps = arguments
    began = time.perf_counter()
    if backend == "reference":
        parts = _reference(folder, size, int(steps))
    else:
        parts = _own(backend, precision, folder, size, int(steps))
    loaded = time.perf_counter() - began
    for name in ("text", "unet", "decode"):
        parts[name]()
    sys.stdout.write(f"{loaded}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        name = line.strip()
        if name == "end":
            sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")
            break
        answer = "none"
        if name in parts:
            began = time.perf_counter()
            parts[name]()
            answer = str(time.perf_counter() - began)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    work(sys.argv[1:])
