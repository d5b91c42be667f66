"""What the runtime costs beside the engines: everything in the loop but the UNet calls.

    python benchmarks/loop_cost.py

The UNet is replaced by one that returns at once; the rest is the pipeline's own loop at batch 1.
"""

import statistics
import time
from dataclasses import replace

import numpy as np

import sdrt
from sdrt.runtime import Pipeline


class Nothing:
    """An engine of no work: the same array every time."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.output = {"output": np.zeros(shape, np.float32)}
        self.inputs = self.outputs = ()

    def __call__(self, feeds: object) -> dict[str, np.ndarray]:
        return self.output

    def close(self) -> None:
        pass


def microseconds(pipe: Pipeline, steps: int) -> float:
    """Median time between two steps of a run, microseconds."""
    marks = [time.perf_counter()]
    for _ in pipe.steps("a red circle", num_inference_steps=steps, seed=0):
        marks.append(time.perf_counter())
    return 1e6 * statistics.median(np.diff(marks[2:]))


def main() -> None:
    with sdrt.load("shapes", backend="onnxruntime") as pipe:
        for side in (64, 512):
            manifest = replace(pipe.manifest, sizes=((side, side),))
            latent = (2, manifest.latent_channels, side // 8, side // 8)
            engines = {**pipe.engines, "unet": Nothing(latent)}
            idle = replace(pipe, manifest=manifest, engines=engines)
            for name in ("PNDMScheduler", "DPMSolverMultistepScheduler"):
                chosen = idle.with_scheduler(name)
                for steps in (20, 50):
                    cost = statistics.median(microseconds(chosen, steps) for _ in range(20))
                    print(f"{side}x{side} {name:28} {steps} steps: {cost:6.1f} us an evaluation")


if __name__ == "__main__":
    main()
