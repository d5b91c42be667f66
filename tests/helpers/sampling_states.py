"""A stand-in for a UNet in numpy, and states of runs that it evaluates."""

import numpy as np

from sdrt.runtime.conditioning_schedule import build_constant_schedule
from sdrt.runtime.denoising import DenoisingState, Guidance, get_history_layout
from sdrt.runtime.samplers.registry import config_from_name
from sdrt.runtime.samplers.table import sampler_table


def evaluate(feeds):
    """A stand-in for a network: every row of its own, from all of its inputs."""
    sample = feeds["sample"]
    shift = (
        feeds["timestep"][:, None, None, None] / 1000
        + feeds["context"].mean((1, 2))[:, None, None, None]
    )
    return {"output": np.tanh(sample[:, :4] * 0.3 + shift + 0.1 * sample[:, 4:].sum(1)[:, None])}


def create_states(
    scheduler, scales, num_images, extra_channels=0, clip=False, shape=(4, 6, 5), context=(7, 3)
):
    """Runs at their beginning: noise and conditioning from a fixed seed.

    Args:
        scheduler: diffusers' class name.
        scales: The guidance scale of every step.
        num_images: How many runs.
        extra_channels: Channels of the UNet besides the latents'.
        clip: Whether the sampler clips, so that it is not linear.
        shape: Of the latents.
        context: Tokens and width.
    """
    config = config_from_name(scheduler, {"_class_name": "DDIMScheduler", "clip_sample": clip})
    table = sampler_table(config, len(scales))
    scales = np.resize(scales, table.evaluations)
    guidance, rng = Guidance(scales), np.random.default_rng(0)
    plan = get_history_layout(table, guidance)
    guided = 2 if (scales != 1.0).any() else 1
    return [
        DenoisingState(
            table,
            guidance,
            plan,
            [rng.normal(size=shape).astype(np.float32) for _ in range(1 + table.num_noises)],
            build_constant_schedule(
                {"context": rng.normal(size=(guided, *context)).astype(np.float32)}
            ),
            rng.normal(size=(extra_channels, *shape[1:])).astype(np.float32),
        )
        for _ in range(num_images)
    ]
