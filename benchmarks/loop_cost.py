"""What the runtime costs beside the engines, next to the reference library's scheduler and loop.

    python benchmarks/loop_cost.py [--save]

The UNet is replaced by one that returns at once; the rest is each one's own loop at batch 1 with
guidance. Also the time to write a sampler's table, and what guidance on a part of the run saves.
"""

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
from results import save

import sdrt
from sdrt.runtime import Pipeline
from sdrt.runtime.samplers import table as tables
from sdrt.runtime.samplers.catalogue import SAMPLERS

PROMPT = "a red circle"
STEPS = 50


class Nothing:
    """An engine of no work: the same array every time."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.output = np.zeros(shape, np.float32)
        self.inputs = self.outputs = ()

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"output": self.output[: len(feeds["sample"])]}

    def close(self) -> None:
        pass


def idle(pipe: Pipeline, side: int) -> Pipeline:
    """The pipeline at another size with a UNet of no work."""
    manifest = replace(pipe.manifest, sizes=((side, side),))
    latent = (2, manifest.latent_channels, side // 8, side // 8)
    return replace(pipe, manifest=manifest, engines={**pipe.engines, "unet": Nothing(latent)})


def own_microseconds(pipe: Pipeline) -> float:
    """Median time between two steps of a run."""
    marks = [time.perf_counter()]
    for _ in pipe.steps(PROMPT, num_inference_steps=STEPS, seed=0):
        marks.append(time.perf_counter())
    return 1e6 * statistics.median(np.diff(marks[2:]))


def reference_microseconds(name: str, config: dict, side: int) -> float:
    """The same of the reference library's loop, as its pipeline writes it, without its engine."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, side // 8, side // 8) * scheduler.init_noise_sigma
    output = torch.zeros(2, 4, side // 8, side // 8)
    marks = [time.perf_counter()]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            unguided, prompted = output.chunk(2)
            guided = unguided + 7.5 * (prompted - unguided)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
            marks.append(time.perf_counter())
    return 1e6 * statistics.median(np.diff(marks[2:]))


def table_milliseconds(name: str) -> float:
    """Writing a table of 50 steps, nothing remembered."""
    config = {"_class_name": name, "clip_sample": False, "solver_order": 3}
    times = []
    for _ in range(9):
        tables._table.cache_clear()
        began = time.perf_counter()
        tables.sampler_table(config, STEPS)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def seconds(pipe: Pipeline, **options: object) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        pipe(PROMPT, num_inference_steps=STEPS, seed=0, **options)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    figures: dict[str, object] = {}
    with sdrt.load("shapes", backend="onnxruntime") as pipe:
        config = dict(pipe.scheduler_config)
        costs: dict[str, dict[str, float]] = {}
        for name in ("PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
            own = idle(pipe, 512).with_scheduler(name)
            pairs = [
                (own_microseconds(own), reference_microseconds(name, config, 512))
                for _ in range(15)
            ]
            ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
            costs[name] = {"own_us": round(ours, 1), "reference_us": round(theirs, 1)}
            print(f"{name:28} {ours:6.1f} us an evaluation, reference {theirs:6.1f} us")
        whole = seconds(pipe, guidance_interval=(0.0, 1.0))
        part = seconds(pipe, guidance_interval=(0.2, 0.6))
    print(f"guidance on 40 % of the run: {part / whole:.2f} of the time of guidance throughout")
    writing = {name: table_milliseconds(name) for name in SAMPLERS}
    slowest = max(writing, key=lambda name: writing[name])
    print(f"a table of {STEPS} steps: {writing[slowest]:.1f} ms at most ({slowest})")
    figures |= {"loop": costs, "interval_share": round(part / whole, 3)}
    figures["table_ms"] = {name: round(value, 2) for name, value in writing.items()}
    ours, theirs = ([cost[key] for cost in costs.values()] for key in ("own_us", "reference_us"))
    if args.save:
        claims = {
            "the loop beside the engine, 4×64×64 latents": f"{min(ours):.0f}–{max(ours):.0f} µs an "
            f"evaluation; the reference library {min(theirs):.0f}–{max(theirs):.0f} µs",
            "a table of 50 steps, slowest of 16 samplers": f"{writing[slowest]:.1f} ms",
            "guidance on 40 % of the run, embedded model": f"{part / whole:.2f} × the time",
        }
        save("loop_cost", claims, figures)


if __name__ == "__main__":
    main()
