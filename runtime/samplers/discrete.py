"""Solvers that go by timesteps: DDIM, DDPM, PNDM, LCM, TCD; each as its paper has it.

A latent at timestep t is `alpha * clean + sigma * noise`, alpha and sigma those of t.
"""

import itertools
import math

import numpy as np

from sdrt.errors import UsageError

from .noise_schedule import NoiseSchedule, alpha_sigma, alphas_cumprod, clean_and_noise
from .protocol import Latent, Run
from .spacing import TimestepGrid


def mix(schedule: NoiseSchedule, ladder: TimestepGrid) -> tuple[float, float]:
    """Shares of picture and noise that a run from the ladder's first rung starts with."""
    return alpha_sigma(schedule, ladder.timesteps[0])


def start(schedule: NoiseSchedule, ladder: TimestepGrid) -> float:
    """The starting noise's standard deviation when there is no picture."""
    return 1.0


def ddim(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Denoising diffusion implicit models: Song et al. 2020 (arXiv:2010.02502), eqs. 12 and 16."""
    for t, to in zip(ladder.timesteps, strides(schedule, ladder), strict=True):
        alpha, sigma = alpha_sigma(schedule, t)
        output = run.output(x, t, alpha, sigma)
        clean, noise = clean_and_noise(schedule, x, output, alpha, sigma)
        clean = run.clipped(clean)
        alpha_to, sigma_to = alpha_sigma(schedule, to)
        fresh = 0.0
        if schedule.eta:
            fresh = schedule.eta * posterior_deviation(alpha, sigma, alpha_to, sigma_to)
        x = alpha_to * clean + math.sqrt(max(sigma_to**2 - fresh**2, 0.0)) * noise
        if schedule.eta:
            x = x + fresh * run.noise()
        x = run.edited(x)
    return x


def posterior_deviation(alpha: float, sigma: float, alpha_to: float, sigma_to: float) -> float:
    """Ho et al. 2020 (arXiv:2006.11239), eq. 7: the square root of beta tilde."""
    return sigma_to / sigma * math.sqrt(max(1.0 - (alpha / alpha_to) ** 2, 0.0))


def ddpm(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Ancestral sampling: Ho et al. 2020 (arXiv:2006.11239), eq. 7 between the rungs taken."""
    cumulative = alphas_cumprod(schedule)
    shares = [float(cumulative[int(t)]) for t in ladder.timesteps] + [1.0]
    for t, share, after in zip(ladder.timesteps, shares, shares[1:], strict=False):
        alpha, sigma = math.sqrt(share), math.sqrt(1.0 - share)
        output = run.output(x, t, alpha, sigma)
        clean, _ = clean_and_noise(schedule, x, output, alpha, sigma)
        clean = run.clipped(clean)
        beta = 1.0 - share / after
        x = (math.sqrt(after) * beta / (1.0 - share)) * clean + (
            math.sqrt(share / after) * (1.0 - after) / (1.0 - share)
        ) * x
        if t > 0:
            small = beta * (1.0 - after) / (1.0 - share)
            large = str(schedule.variance_type).startswith("fixed_large")
            x = x + math.sqrt(max(beta if large else small, 1e-20)) * run.noise()
        x = run.edited(x)
    return x


# Adams and Bashforth's weights of the newest output and those before it.
ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (1.5, -0.5),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Pseudo numerical methods: Liu et al. 2022 (arXiv:2202.09778), eqs. 9, 11 and 12.

    With `skip_prk_steps` the first step is one of Heun's kind: it is taken again with the mean of
    the outputs at its two ends, at the cost of one more evaluation.
    """
    if not ladder.even:
        raise UsageError("PNDMScheduler needs timesteps of one stride; name a number of steps")
    timesteps, targets = ladder.timesteps, strides(schedule, ladder)
    outputs: list[Latent] = []
    first = 0
    if not schedule.skip_prk_steps:
        x, outputs = runge_kutta(schedule, ladder, x, run)
        first = 3
    for i, (t, to) in enumerate(zip(timesteps[first:], targets[first:], strict=True)):
        outputs.insert(0, run.output(x, t, *alpha_sigma(schedule, t)))
        if i == 0 and schedule.skip_prk_steps and len(timesteps) > 1:
            trial = run.edited(transfer(schedule, x, outputs[0], t, to))
            other = run.output(trial, timesteps[1], *alpha_sigma(schedule, timesteps[1]))
            mean = 0.5 * (other + outputs[0])
            stride = schedule.num_train_timesteps // ladder.total
            x = transfer(schedule, x, mean, timesteps[1] + stride, timesteps[1])
        else:
            weights = ADAMS_BASHFORTH[min(len(outputs), 4) - 1]
            mixed = sum(w * out for w, out in zip(weights, outputs, strict=False))
            x = transfer(schedule, x, mixed, t, to)
        x = run.edited(x)
    return x


def runge_kutta(
    schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run
) -> tuple[Latent, list[Latent]]:
    """Three pseudo Runge-Kutta steps (eq. 9) of four evaluations each; also their first outputs,
    newest first.
    """
    timesteps = ladder.timesteps
    if len(timesteps) < 4:
        raise UsageError(
            f"{len(timesteps)} steps of PNDMScheduler with Runge-Kutta start; expected at least "
            "4, or set skip_prk_steps to true"
        )
    half = schedule.num_train_timesteps // ladder.total // 2
    outputs: list[Latent] = []
    for t, to in itertools.pairwise(timesteps[:4]):
        slope = [run.output(x, t, *alpha_sigma(schedule, t))]
        for asked, target in ((to + half, t - half), (to + half, to + half), (to, to)):
            trial = run.edited(transfer(schedule, x, slope[-1], t, target))
            slope.append(run.output(trial, asked, *alpha_sigma(schedule, asked)))
        mean = (1 / 6) * (slope[0] + slope[3]) + (1 / 3) * (slope[1] + slope[2])
        x = run.edited(transfer(schedule, x, mean, t, to))
        outputs.insert(0, slope[0])
    return x, outputs


def transfer(schedule: NoiseSchedule, x: Latent, output: Latent, t: float, to: float) -> Latent:
    """PNDM's transfer (eq. 11): one deterministic step along the given output."""
    clean, noise = clean_and_noise(schedule, x, output, *alpha_sigma(schedule, t))
    alpha, sigma = alpha_sigma(schedule, to)
    return alpha * clean + sigma * noise


def lcm(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Multistep consistency sampling: Luo et al. 2023 (arXiv:2310.04378), algorithm 3."""
    for i, t in enumerate(ladder.timesteps):
        alpha, sigma = alpha_sigma(schedule, t)
        output = run.output(x, t, alpha, sigma)
        clean, _ = clean_and_noise(schedule, x, output, alpha, sigma)
        clean = run.clipped(clean)
        scaled, data = t * schedule.timestep_scaling, 0.5
        length = math.hypot(scaled, data)
        x = (scaled / length) * clean + (data / length) ** 2 * x
        if i + 1 < len(ladder.timesteps):
            alpha, sigma = alpha_sigma(schedule, ladder.timesteps[i + 1])
            x = alpha * x + sigma * run.noise()
        x = run.edited(x)
    return x


def tcd(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Strategic stochastic sampling: Zheng et al. 2024 (arXiv:2402.19159), algorithm 4; eta is
    the paper's gamma.
    """
    targets = (*ladder.timesteps[1:], 0.0)
    for i, (t, to) in enumerate(zip(ladder.timesteps, targets, strict=True)):
        # In float32, as the reference library has it: it decides which whole number lies below.
        below = float(np.floor(np.float32(1.0 - schedule.eta) * np.float32(to)))
        alpha, sigma = alpha_sigma(schedule, t)
        output = run.output(x, t, alpha, sigma)
        clean, noise = clean_and_noise(schedule, x, output, alpha, sigma)
        alpha, sigma = alpha_sigma(schedule, below)
        x = alpha * clean + sigma * noise
        if schedule.eta and i + 1 < len(ladder.timesteps):
            keep = alpha_sigma(schedule, to)[0] / alpha
            x = keep * x + math.sqrt(1.0 - keep**2) * run.noise()
        x = run.edited(x)
    return x


def strides(schedule: NoiseSchedule, ladder: TimestepGrid) -> tuple[float, ...]:
    """Where each step goes: one stride down, or to the caller's next timestep; last the end."""
    if not ladder.even:
        return (*ladder.timesteps[1:], -1.0)
    stride = schedule.num_train_timesteps // ladder.total
    return tuple(t - stride for t in ladder.timesteps)
