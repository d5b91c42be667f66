"""Full-size Stable Diffusion 1.5 on this machine's GPU, with every engine that runs here.

    python benchmarks/gpu.py [--sizes 512x512,768x768] [--steps 20,50] [--rounds 20] [--work FOLDER]
                             [--engines A,B] [--save]

Weights are random, of the published configuration: speed does not depend on their values. Engines
are diffusers in fp16, as it is and compiled (`torch.compile`, channels last), ONNX
Runtime on CUDA, and the TensorRT that this GPU takes; each lives in a process of its own. Measured
are the text encoder, the UNet at 1 to 16 rows, decoding, whole images with guidance, load, memory
and the time from a process's start to its first image, next to what the GPU reaches in a large
product and a large copy. Minutes, and about 10 GB of disk. Never run yet.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from published import made_bundle, reference_pipeline
from results import FOLDER, save

from sdrt.bundle import parse_size
from sdrt.engine import list_backends
from sdrt.engine.gpu import detect_gpus, free_memory

PROMPT = "a lighthouse at dusk"
ROWS = (1, 2, 4, 8, 16)
REFERENCES = ("reference fp16", "reference fp16 compiled")
PLAIN = "onnxruntime, plain graph"  # without fused operators
Part = Callable[[], object]


def contestants() -> dict[str, str | None]:
    """Every engine, and why it cannot run here."""
    actual: dict[str, str | None] = {}
    torch = next(c for c in list_backends() if c.backend == "torch" and c.device == "cuda")
    for name in REFERENCES:
        actual[name] = torch.unavailable_reason
    for candidate in list_backends():
        if candidate.device == "cuda":
            actual[candidate.backend] = candidate.unavailable_reason
    actual[PLAIN] = actual["onnxruntime"]
    return actual


def own_parts(backend: str, bundle: Path, sizes: list[str], steps: list[int]) -> dict[str, Part]:
    """What a worker with this project's pipeline can time, by name."""
    import sdrt

    if backend == PLAIN:
        backend = "onnxruntime"
        os.environ["SDRT_ORT_CUDA"] = "fused=0"
    pipe = sdrt.load(bundle, backend=backend)
    if not pipe.backend.endswith("cuda"):
        sys.exit(f"{backend} fell back to {pipe.backend}")
    return parts_of(pipe, sizes, steps)


def parts_of(pipe: Any, sizes: list[str], steps: list[int]) -> dict[str, Part]:
    """What is timed of one of this project's pipelines."""
    rng, engines = np.random.default_rng(0), pipe.engines
    shapes = {spec.name: spec.shape for spec in pipe.manifest.components["unet"].inputs}
    tokens, width = pipe.manifest.max_tokens, shapes["context"][2]
    ids = {"input_ids": pipe.tokenizer(["", PROMPT])}
    parts: dict[str, Part] = {"text encoder": partial(engines["text_encoder"], ids)}
    for size in sizes:
        sides = [side // pipe.manifest.downscale for side in reversed(parse_size(size))]
        for rows in ROWS:
            feeds = {
                "sample": rng.normal(size=(rows, 4, *sides)).astype(np.float16),
                "timestep": np.full(rows, 500, np.float32),
                "context": rng.normal(size=(rows, tokens, width)).astype(np.float16),
            }
            parts[f"UNet {size}, {rows} rows"] = partial(engines["unet"], feeds)
        latents = {"latents": rng.normal(size=(1, 4, *sides)).astype(np.float16)}
        parts[f"decode {size}"] = partial(engines["vae_decoder"], latents)
        for count in steps:
            options: dict[str, Any] = {"num_inference_steps": count, "size": size, "seed": 0}
            complete = partial(pipe, PROMPT, **options)
            parts[f"picture {size}, {count} steps"] = complete
            watched = partial(complete, on_step=lambda step: None)
            parts[f"picture {size}, {count} steps, step by step"] = watched
    return parts


def reference_parts(
    model: Path, compiled: bool, sizes: list[str], steps: list[int], device: str = "cuda"
) -> dict[str, Part]:
    """The same parts of diffusers' pipeline."""
    import torch

    pipe = reference_pipeline(model, "float16").to(device)
    if compiled:
        for name in ("unet", "vae"):
            getattr(pipe, name).to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune")
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune")
    half = partial(torch.randn, device=device, dtype=torch.float16)
    ids = pipe.tokenizer(
        ["", PROMPT], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids.to(device)
    conditioning = ids.shape[1], pipe.unet.config.cross_attention_dim
    parts: dict[str, Part] = {"text encoder": partial(pipe.text_encoder, ids)}
    for size in sizes:
        width, height = parse_size(size)
        shape = (4, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        time_now = torch.tensor(500.0, device=device)
        for rows in ROWS:
            fed = half((rows, *shape)), time_now, half((rows, *conditioning))
            parts[f"UNet {size}, {rows} rows"] = partial(pipe.unet, *fed)
        parts[f"decode {size}"] = partial(pipe.vae.decode, half((1, *shape)))
        for count in steps:
            options: dict[str, Any] = {"num_inference_steps": count}
            options |= {"width": width, "height": height}
            parts[f"picture {size}, {count} steps"] = partial(pipe, PROMPT, **options)

    def waited(part: Part) -> None:
        with torch.inference_mode():
            part()
        if device == "cuda":
            torch.cuda.synchronize()

    return {name: partial(waited, part) for name, part in parts.items()}


def ceilings() -> dict[str, float]:
    """What the GPU reaches: a product of large fp16 matrices of noise, and a large copy."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    actual = {}
    for name, part, amount in (
        ("fp16 product, TFLOP/s", lambda: a @ b, 2 * 8192**3 / 1e12),
        ("copy, GB/s", lambda: target.copy_(source), 2 * (1 << 30) / 1e9),
    ):
        seconds = []
        for _ in range(30):
            torch.cuda.synchronize()
            began = time.perf_counter()
            part()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        actual[name] = amount / float(np.median(seconds[5:]))
    return actual


def work(args: argparse.Namespace) -> None:
    """A worker: loads, says how long that took, then times what its standard input names."""
    began = time.perf_counter()
    sizes, steps = args.sizes.split(","), [int(n) for n in args.steps.split(",")]
    if args.worker in REFERENCES:
        compiled = args.worker.endswith("compiled")
        parts = reference_parts(args.work / "model", compiled, sizes, steps)
    else:
        parts = own_parts(args.worker, args.work / "bundle", sizes, steps)
    loaded = time.perf_counter() - began
    parts[f"picture {sizes[0]}, {steps[0]} steps"]()
    first = time.perf_counter() - began
    print(json.dumps({"load": loaded, "first image": first, "parts": list(parts)}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        parts[line.strip()]()
        print(time.perf_counter() - began, flush=True)


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One engine's figures. Its first runs of a part are not counted."""
    gpu = detect_gpus().gpus[0]
    before = free_memory(gpu)
    command = [sys.executable, __file__, "--worker", name, "--work", str(args.work)]
    command += ["--sizes", args.sizes, "--steps", args.steps]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None and worker.stdout is not None
    began = time.perf_counter()
    try:
        line = worker.stdout.readline()
        if not line:
            return {"failed": f"ended with {worker.wait()}"}
        started = json.loads(line)
        actual: dict[str, Any] = {"cold start": time.perf_counter() - began, **started, "parts": {}}
        for part in started["parts"]:
            seconds = []
            for _ in range(args.rounds + 3):
                worker.stdin.write(f"{part}\n")
                worker.stdin.flush()
                seconds.append(float(worker.stdout.readline()))
            low, high = np.percentile(seconds[3:], [50, 99]).tolist()
            actual["parts"][part] = {"p50": low, "p99": high}
        if before is not None and (left := free_memory(gpu)) is not None:
            actual["bytes"] = before - left
        return actual
    except ValueError:  # it ended in the middle, and its last answer is empty
        return {"failed": f"ended with {worker.wait()}"}
    finally:
        worker.kill()
        worker.wait()


def text_of(actual: dict[str, dict[str, Any]]) -> str:
    """A table: parts down, engines across; milliseconds, median and 99th percentile."""
    good = {name: figures for name, figures in actual.items() if "parts" in figures}
    parts = list(dict.fromkeys(part for figures in good.values() for part in figures["parts"]))
    lines = ["| ms: p50 (p99) | " + " | ".join(good) + " |", "|---" * (len(good) + 1) + "|"]
    for part in parts:
        cells = []
        for figures in good.values():
            value = figures["parts"].get(part)
            cells.append(f"{value['p50'] * 1e3:.1f} ({value['p99'] * 1e3:.1f})" if value else "–")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    for key in ("load", "cold start"):
        lines.append(f"| {key}, s | " + " | ".join(f"{f[key]:.1f}" for f in good.values()) + " |")
    cells = [f"{f['bytes'] / 1e9:.2f}" if "bytes" in f else "–" for f in good.values()]
    lines.append("| GPU memory, GB | " + " | ".join(cells) + " |")
    failed = [f"{name}: {f['failed']}" for name, f in actual.items() if "failed" in f]
    return "\n".join([*lines, *failed])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="512x512,768x768")
    parser.add_argument("--steps", default="20,50")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work", type=Path, help="keep the model and the bundle here")
    parser.add_argument("--engines", help="only these, by name")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args)
    if reason := detect_gpus().unavailable_reason:
        sys.exit(f"gpu.py: {reason}; this benchmark needs one")
    gpu, engines = detect_gpus().gpus[0], contestants()
    for name, why_not in engines.items():
        if why_not:
            print(f"{name}: not here: {why_not}", file=sys.stderr)
    chosen = [name for name, why_not in engines.items() if not why_not]
    if args.engines:
        chosen = [name for name in args.engines.split(",") if name in chosen]
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        began = time.perf_counter()
        batch = f"1:1:{max(ROWS) // 2}"
        made_bundle(args.work, args.sizes.split(","), "--fp16", "--batch", batch)
        building = time.perf_counter() - began
        actual = {name: measured(name, args) for name in chosen}
        plans = [json.loads(path.read_text()) for path in args.work.glob("bundle/plans/*/*.json")]
    limits = ceilings() if REFERENCES[0] in chosen else {}
    print(text_of(actual))
    print(json.dumps({"ceilings": limits, "bundle seconds": building}, indent=2))
    if args.save:
        figures: dict[str, object] = {"gpu": gpu.name, "engines": actual, "ceilings": limits}
        built = {p["key"]["component"]: (p["seconds"], p["size"]) for p in plans}
        figures |= {
            "driver": detect_gpus().driver_version,
            "bundle seconds": building,
            "plans": built,
        }
        save(f"gpu_{gpu.sm}", claims_of(gpu.name, actual), figures)
        draw(actual, gpu.name, FOLDER / f"gpu_{gpu.sm}.svg")


def draw(actual: dict[str, dict[str, Any]], gpu: str, out: Path) -> None:
    """Bars of whole images, and of the UNet by rows, every engine in its colour."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sdrt"
    from matplotlib import pyplot

    good = {name: figures["parts"] for name, figures in actual.items() if "parts" in figures}
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
        if part.startswith("picture")
    }


if __name__ == "__main__":
    main()
