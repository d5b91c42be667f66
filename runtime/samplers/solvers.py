"""The solvers, each written once, as its paper has it, in plain arithmetic.

A solver does not care what a latent is: anything that can be added and multiplied by a number.
`run.output(x, t)` evaluates the model on x at timestep t. Conventions: a latent at timestep t is
`alpha * clean + sigma * noise`; where the variance explodes instead, the latent is divided by
alpha and its noise level is `level = sigma / alpha`.
"""

import math
from typing import Any, Protocol

import numpy as np

from .schedule import Schedule

Latent = Any


class Run(Protocol):
    """What a solver is given: a starting noise of unit variance and the model."""

    start: Latent

    def output(self, x: Latent, timestep: float) -> Latent: ...


def ddim(schedule: Schedule, steps: int, run: Run) -> Latent:
    """Denoising diffusion implicit models, eta 0: Song et al. 2020 (arXiv:2010.02502), eq. 12."""
    stride = schedule.num_train_timesteps // steps
    x = run.start
    for t in spaced(schedule, steps):
        alpha, sigma = alpha_sigma(schedule, t)
        clean, noise = clean_and_noise(schedule, x, run.output(x, t), alpha, sigma)
        alpha, sigma = alpha_sigma(schedule, t - stride)
        x = alpha * clean + sigma * noise
    return x


# Adams and Bashforth's weights of the newest output and those before it.
ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (1.5, -0.5),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(schedule: Schedule, steps: int, run: Run) -> Latent:
    """Pseudo linear multistep: Liu et al. 2022 (arXiv:2202.09778), eqs. 9 and 11.

    The first step is one of Heun's kind: it is taken again with the mean of the outputs at its
    two ends, which costs one evaluation more than there are steps.
    """
    stride = schedule.num_train_timesteps // steps
    timesteps = spaced(schedule, steps)
    x = run.start
    outputs: list[Latent] = []
    for i, t in enumerate(timesteps):
        outputs.insert(0, run.output(x, t))
        if i == 0 and steps > 1:
            trial = transfer(schedule, x, outputs[0], t, t - stride)
            repeated = run.output(trial, timesteps[1])
            mean = 0.5 * (repeated + outputs[0])
            x = transfer(schedule, x, mean, timesteps[1] + stride, timesteps[1])
            continue
        weights = ADAMS_BASHFORTH[min(len(outputs), 4) - 1]
        mixed = sum(w * out for w, out in zip(weights, outputs, strict=False))
        x = transfer(schedule, x, mixed, t, t - stride)
    return x


def transfer(schedule: Schedule, x: Latent, output: Latent, t: float, to: float) -> Latent:
    """PNDM's transfer (eq. 11): one deterministic step along the given output."""
    alpha, sigma = alpha_sigma(schedule, t)
    clean, noise = clean_and_noise(schedule, x, output, alpha, sigma)
    alpha, sigma = alpha_sigma(schedule, to)
    return alpha * clean + sigma * noise


def euler(schedule: Schedule, steps: int, run: Run) -> Latent:
    """Euler's method on the probability flow: Karras et al. 2022 (arXiv:2206.00364), alg. 1."""
    timesteps = spaced(schedule, steps, whole=False)
    levels = levels_at(schedule, timesteps)
    levels.append(0.0 if schedule.final_sigmas_type == "zero" else level_range(schedule)[0])
    x = initial_level(schedule, levels[0]) * run.start
    for t, level, after in zip(timesteps, levels, levels[1:], strict=False):
        alpha = 1.0 / math.hypot(level, 1.0)
        scaled = alpha * x
        _clean, noise = clean_and_noise(
            schedule, scaled, run.output(scaled, t), alpha, level * alpha
        )
        x = x + (after - level) * noise
    return x


def dpmpp_2m(schedule: Schedule, steps: int, run: Run) -> Latent:
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), algorithm 2, midpoint form."""
    timesteps = spaced_before_end(schedule, steps)
    levels = levels_at(schedule, timesteps)
    levels.append(0.0 if schedule.final_sigmas_type == "zero" else level_range(schedule)[0])
    x, previous, step_before = run.start, None, 0.0
    for i, t in enumerate(timesteps):
        alpha, sigma = alpha_sigma_from_level(levels[i])
        clean, _ = clean_and_noise(schedule, x, run.output(x, t), alpha, sigma)
        step = log_ratio(levels[i], levels[i + 1])
        alpha_after, sigma_after = alpha_sigma_from_level(levels[i + 1])
        direction = clean
        if previous is not None and not (i == steps - 1 and ends_in_first_order(schedule, steps)):
            direction = clean + (0.5 * step / step_before) * (clean - previous)
        x = (sigma_after / sigma) * x - alpha_after * math.expm1(-step) * direction
        previous, step_before = clean, step
    return x


def ends_in_first_order(schedule: Schedule, steps: int) -> bool:
    """Whether the last step of a multistep solver falls back to first order."""
    few = schedule.lower_order_final and steps < 15
    return few or schedule.euler_at_final or schedule.final_sigmas_type == "zero"


def clean_and_noise(
    schedule: Schedule, x: Latent, output: Latent, alpha: float, sigma: float
) -> tuple[Latent, Latent]:
    """The clean latent and the noise in x that the model's output stands for.

    `v_prediction`: Salimans and Ho 2022 (arXiv:2202.00512), appendix D.
    """
    if schedule.prediction_type == "epsilon":
        return (1.0 / alpha) * (x - sigma * output), output
    if schedule.prediction_type == "sample":
        return output, (1.0 / sigma) * (x - alpha * output)
    return alpha * x - sigma * output, alpha * output + sigma * x


def spaced(schedule: Schedule, steps: int, *, whole: bool = True) -> list[float]:
    """Timesteps of a run, falling (Lin et al. 2023, arXiv:2305.08891, table 2)."""
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        even = np.linspace(0, total - 1, steps)[::-1]
        return [float(t) for t in (even.round() if whole else even)]
    if schedule.timestep_spacing == "trailing":
        return [float(t) for t in trailing(total, steps)]
    return [float(t * (total // steps) + schedule.steps_offset) for t in range(steps)][::-1]


def spaced_before_end(schedule: Schedule, steps: int) -> list[float]:
    """As `spaced`, but one more timestep is laid out and the lowest left to the final level."""
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        return [float(t) for t in np.linspace(0, total - 1, steps + 1).round()[:0:-1]]
    if schedule.timestep_spacing == "trailing":
        return [float(t) for t in trailing(total, steps)]
    stride = total // (steps + 1)
    return [float(t * stride + schedule.steps_offset) for t in range(steps, 0, -1)]


def trailing(total: int, steps: int) -> np.ndarray:
    return np.arange(total, 0, -total / steps).round() - 1


def alpha_sigma(schedule: Schedule, timestep: float) -> tuple[float, float]:
    """Shares of clean latent and noise at a timestep; below 0 it is the end of the run."""
    cumulative = schedule.alphas_cumprod
    if timestep >= 0:
        share = cumulative[int(timestep)]
    else:
        share = 1.0 if schedule.set_alpha_to_one else cumulative[0]
    return math.sqrt(share), math.sqrt(1.0 - share)


def alpha_sigma_from_level(level: float) -> tuple[float, float]:
    """Shares of clean latent and noise at a noise level."""
    alpha = 1.0 / math.hypot(level, 1.0)
    return alpha, level * alpha


def all_levels(schedule: Schedule) -> np.ndarray:
    """Noise levels of all training steps, [num_train_timesteps]."""
    cumulative = schedule.alphas_cumprod
    levels: np.ndarray = np.sqrt((1.0 - cumulative) / cumulative)
    return levels


def level_range(schedule: Schedule) -> tuple[float, float]:
    levels = all_levels(schedule)
    return float(levels[0]), float(levels[-1])


def levels_at(schedule: Schedule, timesteps: list[float]) -> list[float]:
    levels = all_levels(schedule)
    return [float(v) for v in np.interp(timesteps, np.arange(len(levels)), levels)]


def initial_level(schedule: Schedule, highest: float) -> float:
    """The starting noise's standard deviation where the variance explodes."""
    if schedule.timestep_spacing in ("linspace", "trailing"):
        return highest
    return math.hypot(highest, 1.0)


def log_ratio(level: float, after: float) -> float:
    """The step in log signal-to-noise ratio; infinite when nothing of the noise is left."""
    return math.log(level / after) if after > 0 else math.inf
