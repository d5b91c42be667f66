"""Solvers by noise level, in the form of Karras et al. 2022 (arXiv:2206.00364): Euler, Heun, DPM2,
their ancestral kin, LMS and DPM++ SDE.

A latent is `clean + level * noise`, so it grows with the noise; the model is fed that divided by
`sqrt(level**2 + 1)`. Along the probability flow, `d latent / d level` is the noise in it.
"""

import math

import numpy as np

from .noise_schedule import NoiseSchedule, alpha_sigma_from_level, clean_and_noise
from .protocol import Latent, Run
from .spacing import TimestepGrid, timesteps_at


def mix(schedule: NoiseSchedule, ladder: TimestepGrid) -> tuple[float, float]:
    """Shares of picture and noise that a run from the ladder's first rung starts with."""
    return 1.0, ladder.levels[0]


def start(schedule: NoiseSchedule, ladder: TimestepGrid) -> float:
    """The starting noise's standard deviation when there is no picture."""
    if schedule.sigma_schedule or schedule.timestep_spacing in ("linspace", "trailing"):
        return ladder.levels[0]
    return math.hypot(ladder.levels[0], 1.0)


def clean_noise(
    schedule: NoiseSchedule, run: Run, x: Latent, timestep: float, level: float
) -> tuple[Latent, Latent]:
    """One evaluation: the clean latent and the noise in x."""
    alpha, sigma = alpha_sigma_from_level(level)
    scaled = alpha * x
    output = run.output(scaled, timestep, alpha, sigma)
    return clean_and_noise(schedule, scaled, output, alpha, sigma)


def euler(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Euler's method on the probability flow: algorithm 1 without its second half."""
    levels = ladder.levels
    for t, level, after in zip(ladder.timesteps, levels, levels[1:], strict=False):
        _, noise = clean_noise(schedule, run, x, t, level)
        x = run.edited(x + (after - level) * noise)
    return x


def heun(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Heun's method: algorithm 1. The last step, to no noise, is Euler's."""
    levels, timesteps = ladder.levels, ladder.timesteps
    for i, (t, level, after) in enumerate(zip(timesteps, levels, levels[1:], strict=False)):
        _, slope = clean_noise(schedule, run, x, t, level)
        trial = run.edited(x + (after - level) * slope)
        if after == 0.0 or i + 1 == len(timesteps):
            return trial
        _, other = clean_noise(schedule, run, trial, timesteps[i + 1], after)
        x = run.edited(x + (after - level) * 0.5 * (slope + other))
    return x


def dpm2(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """The midpoint method in log level: algorithm 2 without churn, as DPM-Solver-2 has it."""
    levels = ladder.levels
    for t, level, after in zip(ladder.timesteps, levels, levels[1:], strict=False):
        _, noise = clean_noise(schedule, run, x, t, level)
        if after == 0.0:
            return run.edited(x - level * noise)
        middle = math.sqrt(level * after)
        trial = run.edited(x + (middle - level) * noise)
        _, noise = clean_noise(schedule, run, trial, timestep_at(schedule, middle), middle)
        x = run.edited(x + (after - level) * noise)
    return x


def euler_ancestral(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Euler to below the next level, then fresh noise up to it."""
    levels = ladder.levels
    for t, level, after in zip(ladder.timesteps, levels, levels[1:], strict=False):
        _, noise = clean_noise(schedule, run, x, t, level)
        down, up = down_and_up(level, after, schedule.eta)
        x = run.edited(x + (down - level) * noise + up * run.noise())
    return x


def dpm2_ancestral(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """The midpoint method to below the next level, then fresh noise up to it."""
    levels = ladder.levels
    for t, level, after in zip(ladder.timesteps, levels, levels[1:], strict=False):
        _, noise = clean_noise(schedule, run, x, t, level)
        down, up = down_and_up(level, after, schedule.eta)
        if down == 0.0:
            return run.edited(x - level * noise)
        middle = math.sqrt(level * down)
        trial = run.edited(x + (middle - level) * noise)
        _, noise = clean_noise(schedule, run, trial, timestep_at(schedule, middle), middle)
        x = run.edited(x + (down - level) * noise + up * run.noise())
    return x


def dpmpp_sde(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """DPM-Solver++ (SDE) of two evaluations: Lu et al. 2022 (arXiv:2211.01095) in Karras's form.

    Both stages of a step read one Brownian path over the level: the noise of the whole step is
    that of its two parts, weighted by the square roots of their lengths.
    """
    if schedule.algorithm_type == "ancestral":
        return dpmpp_2s_ancestral(schedule, ladder, x, run)
    levels = ladder.levels
    for t, level, after in zip(ladder.timesteps, levels, levels[1:], strict=False):
        clean, noise = clean_noise(schedule, run, x, t, level)
        if after == 0.0:
            return run.edited(x - level * noise)
        middle = math.sqrt(level * after)
        first, second = run.noise(), run.noise()
        down, up = down_and_up(level, middle, schedule.eta)
        trial = (down / level) * x + (1.0 - down / level) * clean + up * first
        asked = timestep_at(schedule, middle)
        clean, _ = clean_noise(schedule, run, run.edited(trial), asked, middle)
        share = (level - middle) / (level - after)
        path = math.sqrt(share) * first + math.sqrt(1.0 - share) * second
        down, up = down_and_up(level, after, schedule.eta)
        x = run.edited((down / level) * x + (1.0 - down / level) * clean + up * path)
    return x


def dpmpp_2s_ancestral(
    schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run
) -> Latent:
    """DPM-Solver++(2S) to below the next level, then fresh noise up to it: Lu et al. 2022
    (arXiv:2211.01095), algorithm 1, its middle halfway in the level's logarithm.
    """
    levels = ladder.levels
    for t, level, after in zip(ladder.timesteps, levels, levels[1:], strict=False):
        clean, noise = clean_noise(schedule, run, x, t, level)
        down, up = down_and_up(level, after, schedule.eta)
        if down == 0.0:
            return run.edited(x - level * noise)
        middle = math.sqrt(level * down)
        trial = run.edited((middle / level) * x + (1.0 - middle / level) * clean)
        asked = timestep_at(schedule, middle)
        clean, _ = clean_noise(schedule, run, trial, asked, middle)
        x = (down / level) * x + (1.0 - down / level) * clean
        x = run.edited(x + up * run.noise())
    return x


def down_and_up(level: float, after: float, eta: float) -> tuple[float, float]:
    """The level to step down to, and the fresh noise that leads back up to `after`; eta: 1 is all
    of it, 0 none.
    """
    up = min(after, eta * after * math.sqrt(max(level**2 - after**2, 0.0)) / level)
    return math.sqrt(max(after**2 - up**2, 0.0)), up


def timestep_at(schedule: NoiseSchedule, level: float) -> float:
    return float(timesteps_at(schedule, np.array(level)))


def lms(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Linear multistep of order four: the polynomial through the slopes, integrated over the level
    (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5).
    """
    slopes: list[Latent] = []
    levels = ladder.levels
    for i, t in enumerate(ladder.timesteps):
        _, noise = clean_noise(schedule, run, x, t, levels[i])
        slopes = [noise, *slopes[:3]]
        nodes = [levels[i - k] for k in range(len(slopes))]
        for k, slope in enumerate(slopes):
            x = x + lagrange_integral(nodes, k, levels[i], levels[i + 1]) * slope
        x = run.edited(x)
    return x


# Gauss and Legendre's two nodes integrate cubics exactly.
GAUSS = (0.5 - 0.5 / math.sqrt(3.0), 0.5 + 0.5 / math.sqrt(3.0))


def lagrange_integral(nodes: list[float], k: int, low: float, high: float) -> float:
    """The integral from low to high of the polynomial that is 1 at node k and 0 at the others."""
    total = 0.0
    for share in GAUSS:
        at = low + share * (high - low)
        others = [node for i, node in enumerate(nodes) if i != k]
        total += math.prod((at - node) / (nodes[k] - node) for node in others)
    return 0.5 * (high - low) * total
