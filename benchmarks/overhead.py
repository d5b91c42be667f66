"""What does an image cost next to the engines, next to diffusers' own pipeline?

    python benchmarks/overhead.py [--save]

Text encoder, UNet and decoder are replaced by ones that return at once, here and there; what is
left is each one's own: the time from one evaluation to the next at batch 1 with guidance and
latents of 4x64x64, and what an image of 512x512 takes besides (reading the prompt, noise, the
sampler's table, pixels). Also the time to write a sampler's table, and what guidance on a part of
the run saves.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from time import perf_counter as now
from typing import Any

import diffusers
import numpy as np
from published import reference_pipeline
from results import save

import sdrt
from sdrt.engine import Engine
from sdrt.runtime import Pipeline, randn
from sdrt.runtime.samplers import table as tables
from sdrt.runtime.samplers.registry import SAMPLERS

PROMPT = "a red circle"
STEPS = 50
SIDE, LATENT = 512, (4, 64, 64)


class Nothing:
    """An engine of no work: the same arrays every time."""

    def __init__(self, real: Engine, **arrays: np.ndarray) -> None:
        self.arrays, self.inputs, self.outputs = arrays, real.inputs, real.outputs

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = len(next(iter(feeds.values())))
        return {name: array[:rows] for name, array in self.arrays.items()}

    def close(self) -> None:
        pass


def idle(pipe: Pipeline) -> Pipeline:
    """The pipeline at another size, with engines of no work."""
    manifest = replace(pipe.manifest, sizes=((SIDE, SIDE),))
    ids = np.zeros((2, manifest.max_tokens), np.int64)
    encoded = pipe.engines["text_encoder"]({"input_ids": ids})
    constant = {
        "text_encoder": {name: np.array(array) for name, array in encoded.items()},
        "unet": {"output": np.zeros((2, *LATENT), np.float32)},
        # Not of a single colour, which causes a warning.
        "vae_decoder": {"image": randn(0, (1, 3, SIDE, SIDE))},
    }
    nothing = {name: Nothing(pipe.engines[name], **outputs) for name, outputs in constant.items()}
    return replace(pipe, manifest=manifest, engines={**pipe.engines, **nothing}, chunk_cache={})


def own_costs(pipe: Pipeline) -> tuple[float, float]:
    """Microseconds of an evaluation, and milliseconds of an image besides."""
    marks = [now()]
    began = marks[0]
    pipe.chunk_cache.clear()
    pipe(PROMPT, num_inference_steps=STEPS, seed=0, on_step=lambda _: marks.append(now()))
    return costs_of(marks, now() - began)


def costs_of(marks: list[float], full: float) -> tuple[float, float]:
    evaluation = statistics.median(np.diff(marks[2:]))
    return 1e6 * evaluation, 1e3 * (full - STEPS * evaluation)


def idle_reference(checkpoint: Path) -> Any:
    """diffusers' pipeline with modules of no work in place of its own."""
    import torch
    from diffusers.models.autoencoders.vae import DecoderOutput

    pipe = reference_pipeline(checkpoint, "float32")
    output, image = torch.zeros(2, *LATENT), torch.randn(1, 3, SIDE, SIDE)
    encoded = pipe.text_encoder(torch.zeros(1, 8, dtype=torch.long))
    pipe.text_encoder.forward = lambda *_, **__: encoded
    pipe.unet.forward = lambda *_, **__: (output,)
    pipe.vae.decode = lambda *_, return_dict=True, **__: (
        DecoderOutput(sample=image) if return_dict else (image,)
    )
    return pipe


def reference_costs(pipe: Any) -> tuple[float, float]:
    import torch

    def mark(_pipe: Any, _step: int, _timestep: Any, provided: dict[str, Any]) -> dict[str, Any]:
        marks.append(now())
        return provided

    marks = [now()]
    began = marks[0]
    generator = torch.Generator("cpu").manual_seed(0)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS}
    pipe(PROMPT, generator=generator, callback_on_step_end=mark, **options)
    return costs_of(marks, now() - began)


def table_milliseconds(name: str) -> float:
    """Writing a table of 50 steps, nothing remembered."""
    config = {"_class_name": name, "clip_sample": False, "solver_order": 3}
    times = []
    for _ in range(9):
        tables._cached_table.cache_clear()
        began = now()
        tables.sampler_table(config, STEPS)
        times.append(now() - began)
    return 1e3 * statistics.median(times)


def seconds(pipe: Pipeline, **options: object) -> float:
    times = []
    for _ in range(7):
        began = now()
        pipe(PROMPT, num_inference_steps=STEPS, seed=0, **options)
        times.append(now() - began)
    return statistics.median(times)


def span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}–{high:.0f}" if high > 10 else f"{low:.1f}–{high:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    figures: dict[str, object] = {}
    checkpoint = Path(sdrt.__file__).parent / "models" / "shapes"
    reference = idle_reference(checkpoint)
    with sdrt.load("shapes", backend="onnxruntime") as pipe:
        costs: dict[str, dict[str, float]] = {}
        for name in ("PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
            own = idle(pipe).with_scheduler(name)
            kind = getattr(diffusers, name)
            reference.scheduler = kind.from_config(reference.scheduler.config)
            pairs = [(*own_costs(own), *reference_costs(reference)) for _ in range(15)]
            keys = ("own_us", "own_image_ms", "reference_us", "reference_image_ms")
            values = (statistics.median(side) for side in zip(*pairs, strict=True))
            costs[name] = {k: round(float(v), 2) for k, v in zip(keys, values, strict=True)}
            print(name, costs[name])
        full = seconds(pipe, guidance_interval=(0.0, 1.0))
        part = seconds(pipe, guidance_interval=(0.2, 0.6))
    print(f"guidance on 40 % of the run: {part / full:.2f} of the time of guidance throughout")
    writing = {name: table_milliseconds(name) for name in SAMPLERS}
    slowest = max(writing, key=lambda name: writing[name])
    print(f"sampler table of {STEPS} steps: {writing[slowest]:.1f} ms at most ({slowest})")
    figures |= {"loop": costs, "interval_share": round(part / full, 3)}
    figures["table_ms"] = {name: round(value, 2) for name, value in writing.items()}
    spans = {key: span([cost[key] for cost in costs.values()]) for key in keys}
    if args.save:
        claims = {
            "runtime overhead per UNet evaluation, 4×64×64 latents, guided": f"{spans['own_us']} "
            f"µs; diffusers {spans['reference_us']} µs",
            "other overhead per image, 512x512": f"{spans['own_image_ms']} ms; "
            f"diffusers {spans['reference_image_ms']} ms",
            f"sampler table of {STEPS} steps, slowest of {len(writing)} samplers": (
                f"{writing[slowest]:.1f} ms"
            ),
            "guidance on 40 % of the run, embedded model": f"{part / full:.2f} × the time",
        }
        save("overhead", claims, figures)


if __name__ == "__main__":
    main()
