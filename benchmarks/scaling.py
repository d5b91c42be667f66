"""How does cost grow with batch, size and steps? With the exponent of each, fitted.

    python benchmarks/scaling.py [--rounds 3] [--work FOLDER] [--full FOLDER] [--save]

Batch 1 to 16 (2 to 32 rows) and steps 1 to 100 at 256x256, sizes 256 to 1024 at batch 1, on Stable
Diffusion 1.5 at a quarter of its width, a sixteenth of its work, random weights (made in FOLDER).
With `--full`, the folder that latency.py made, sizes 256 to 512 of the full-size model too, one and
two rows. An exponent of 1 means that twice as much takes twice as long.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from published import made_bundle
from results import save

import sdrt
from sdrt.runtime import Pipeline

BATCHES, SIDES, STEPS = (1, 2, 4, 8, 16), (256, 384, 512, 768, 1024), (1, 2, 5, 10, 20, 50, 100)
PROMPT = "a red circle"
Part = Callable[[], object]


def evaluation(pipe: Pipeline, rows: int, side: int) -> Part:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(rows, 4, side // 8, side // 8)).astype(np.float32)
    context = rng.normal(size=(rows, 77, 768)).astype(np.float32)
    feeds = {"sample": latents, "timestep": np.full(rows, 500, np.float32), "context": context}
    return lambda: pipe.engines["unet"](feeds)


def decode(pipe: Pipeline, side: int) -> Part:
    shape = (1, 4, side // 8, side // 8)
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return lambda: pipe.engines["vae_decoder"]({"latents": latents})


def image(pipe: Pipeline, steps: int) -> Part:
    return lambda: pipe(PROMPT, num_inference_steps=steps, size="256x256", seed=0)


def medians(parts: dict[float, Part], rounds: int) -> dict[float, float]:
    """Seconds of each, in turns; the first turn warms."""
    times: dict[float, list[float]] = {at: [] for at in parts}
    for _ in range(rounds + 1):
        for at, part in parts.items():
            began = time.perf_counter()
            part()
            times[at].append(time.perf_counter() - began)
    return {at: float(np.median(item[1:])) for at, item in times.items()}


def exponent(actual: dict[float, float]) -> float:
    """The slope of log seconds over the log of what grows, by least squares."""
    return float(np.polyfit(np.log(list(actual)), np.log(list(actual.values())), 1)[0])


def narrow(pipe: Pipeline) -> dict[str, dict[float, Part]]:
    return {
        "rows of a UNet evaluation, 256x256": {
            2 * n: evaluation(pipe, 2 * n, 256) for n in BATCHES
        },
        "pixels of a UNet evaluation": {side**2: evaluation(pipe, 2, side) for side in SIDES},
        "pixels of a decode": {side**2: decode(pipe, side) for side in SIDES},
        "steps of an image, 256x256": {steps: image(pipe, steps) for steps in STEPS},
    }


def full(pipe: Pipeline) -> dict[str, dict[float, Part]]:
    return {
        "rows of a UNet evaluation, 256x256": {n: evaluation(pipe, n, 256) for n in (1, 2)},
        "pixels of a UNet evaluation": {side**2: evaluation(pipe, 2, side) for side in SIDES[:3]},
        "pixels of a decode": {side**2: decode(pipe, side) for side in SIDES[:3]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--full", type=Path)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    claims: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        kinds = {"quarter width": (made_bundle(work, ["256x256"], divisor=4), narrow)}
        if args.full:
            kinds["full width"] = (made_bundle(args.full, ["256x256", "512x512"]), full)
        for model, (bundle, sweeps_of) in kinds.items():
            with sdrt.load(bundle) as pipe:
                for sweep, parts in sweeps_of(pipe).items():
                    actual, name = medians(parts, args.rounds), f"{sweep}, {model}"
                    figures[name] = {"exponent": exponent(actual), "seconds": actual}
                    bounds = [f"{at:,.0f}: {actual[at]:.3f} s" for at in (min(actual), max(actual))]
                    claims[f"scaling with {name}, {pipe.backend}"] = (
                        f"exponent {exponent(actual):.2f} ({' to '.join(bounds)})"
                    )
                    print(name, json.dumps(figures[name]), flush=True)
    if args.save:
        save("scaling", claims, figures)


if __name__ == "__main__":
    main()
