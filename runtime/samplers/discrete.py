"""Discrete-time solvers: DDIM, DDPM, PNDM, LCM and TCD.

A latent at timestep t is `x = alpha * denoised + sigma * noise`, where alpha is the square root of
`alphas_cumprod[t]` and `alpha**2 + sigma**2 = 1`.

Knows the timesteps of a grid; not how they are spaced.
"""

import itertools
import math

import numpy as np

from sdrt.errors import UsageError

from .noise_schedule import NoiseSchedule, alpha_sigma, alphas_cumprod, denoised_and_noise
from .protocol import Latent, SolverContext
from .spacing import TimestepGrid


def add_noise_scales(schedule: NoiseSchedule, grid: TimestepGrid) -> tuple[float, float]:
    """Factors of the image and of the noise in the latents at the grid's first timestep."""
    return alpha_sigma(schedule, grid.timesteps[0])


def init_noise_sigma(schedule: NoiseSchedule, grid: TimestepGrid) -> float:
    """Standard deviation of the initial noise when there is no image to start from."""
    return 1.0


def sample_ddim(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Denoising diffusion implicit models: Song et al. 2020 (arXiv:2010.02502), eqs. 12 and 16."""
    for t, t_prev in zip(grid.timesteps, previous_timesteps(schedule, grid), strict=True):
        alpha, sigma = alpha_sigma(schedule, t)
        output = context.model(x, t, alpha, sigma)
        denoised, noise = denoised_and_noise(schedule, x, output, alpha, sigma)
        denoised = context.clip(denoised)
        alpha_prev, sigma_prev = alpha_sigma(schedule, t_prev)
        std = 0.0
        if schedule.eta:
            std = schedule.eta * posterior_std(alpha, sigma, alpha_prev, sigma_prev)
        x = alpha_prev * denoised + math.sqrt(max(sigma_prev**2 - std**2, 0.0)) * noise
        if schedule.eta:
            x = x + std * context.noise()
        x = context.callback(x)
    return x


def posterior_std(alpha: float, sigma: float, alpha_prev: float, sigma_prev: float) -> float:
    """The square root of beta tilde: Ho et al. 2020 (arXiv:2006.11239), eq. 7."""
    return sigma_prev / sigma * math.sqrt(max(1.0 - (alpha / alpha_prev) ** 2, 0.0))


def sample_ddpm(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Ancestral sampling: Ho et al. 2020 (arXiv:2006.11239), eq. 7, between timesteps of the
    grid.
    """
    cumprod = alphas_cumprod(schedule)
    alphas_prod = [float(cumprod[int(t)]) for t in grid.timesteps] + [1.0]
    for t, alpha_prod_t, alpha_prod_prev in zip(
        grid.timesteps, alphas_prod, alphas_prod[1:], strict=False
    ):
        alpha, sigma = math.sqrt(alpha_prod_t), math.sqrt(1.0 - alpha_prod_t)
        output = context.model(x, t, alpha, sigma)
        denoised, _ = denoised_and_noise(schedule, x, output, alpha, sigma)
        denoised = context.clip(denoised)
        beta = 1.0 - alpha_prod_t / alpha_prod_prev
        x = (math.sqrt(alpha_prod_prev) * beta / (1.0 - alpha_prod_t)) * denoised + (
            math.sqrt(alpha_prod_t / alpha_prod_prev)
            * (1.0 - alpha_prod_prev)
            / (1.0 - alpha_prod_t)
        ) * x
        if t > 0:
            small = beta * (1.0 - alpha_prod_prev) / (1.0 - alpha_prod_t)
            large = str(schedule.variance_type).startswith("fixed_large")
            x = x + math.sqrt(max(beta if large else small, 1e-20)) * context.noise()
        x = context.callback(x)
    return x


# Adams-Bashforth weights of the newest output and those before it.
ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (1.5, -0.5),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def sample_pndm(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Pseudo numerical methods: Liu et al. 2022 (arXiv:2202.09778), eqs. 9, 11 and 12.

    With `skip_prk_steps` (PLMS) the first step is like Heun's: it is repeated with the mean of the
    outputs at its two ends, which costs one more evaluation.
    """
    if not grid.evenly_spaced:
        raise UsageError(
            "PNDMScheduler requires evenly spaced timesteps",
            hint="set num_inference_steps instead of timesteps or sigmas",
        )
    timesteps, prev_timesteps = grid.timesteps, previous_timesteps(schedule, grid)
    outputs: list[Latent] = []
    first = 0
    if not schedule.skip_prk_steps:
        x, outputs = pseudo_runge_kutta(schedule, grid, x, context)
        first = 3
    for i, (t, t_prev) in enumerate(zip(timesteps[first:], prev_timesteps[first:], strict=True)):
        outputs.insert(0, context.model(x, t, *alpha_sigma(schedule, t)))
        if i == 0 and schedule.skip_prk_steps and len(timesteps) > 1:
            x_mid = context.callback(pndm_transfer(schedule, x, outputs[0], t, t_prev))
            other = context.model(x_mid, timesteps[1], *alpha_sigma(schedule, timesteps[1]))
            mean = 0.5 * (other + outputs[0])
            stride = schedule.num_train_timesteps // grid.num_steps
            x = pndm_transfer(schedule, x, mean, timesteps[1] + stride, timesteps[1])
        else:
            weights = ADAMS_BASHFORTH[min(len(outputs), 4) - 1]
            combined = sum(w * out for w, out in zip(weights, outputs, strict=False))
            x = pndm_transfer(schedule, x, combined, t, t_prev)
        x = context.callback(x)
    return x


def pseudo_runge_kutta(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> tuple[Latent, list[Latent]]:
    """Three pseudo Runge-Kutta steps (eq. 9) of four evaluations each. Returns x and the first
    output of each, newest first.
    """
    timesteps = grid.timesteps
    if len(timesteps) < 4:
        raise UsageError(
            f"{len(timesteps)} steps of PNDMScheduler with Runge-Kutta steps; expected at least 4",
            hint="set skip_prk_steps to true",
        )
    half = schedule.num_train_timesteps // grid.num_steps // 2
    outputs: list[Latent] = []
    for t, t_prev in itertools.pairwise(timesteps[:4]):
        k = [context.model(x, t, *alpha_sigma(schedule, t))]
        for t_eval, target in (
            (t_prev + half, t - half),
            (t_prev + half, t_prev + half),
            (t_prev, t_prev),
        ):
            x_mid = context.callback(pndm_transfer(schedule, x, k[-1], t, target))
            k.append(context.model(x_mid, t_eval, *alpha_sigma(schedule, t_eval)))
        mean = (1 / 6) * (k[0] + k[3]) + (1 / 3) * (k[1] + k[2])
        x = context.callback(pndm_transfer(schedule, x, mean, t, t_prev))
        outputs.insert(0, k[0])
    return x, outputs


def pndm_transfer(
    schedule: NoiseSchedule, x: Latent, output: Latent, t: float, t_prev: float
) -> Latent:
    """PNDM's transfer (eq. 11): one deterministic step along the given output."""
    denoised, noise = denoised_and_noise(schedule, x, output, *alpha_sigma(schedule, t))
    alpha, sigma = alpha_sigma(schedule, t_prev)
    return alpha * denoised + sigma * noise


def sample_lcm(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Multistep consistency sampling: Luo et al. 2023 (arXiv:2310.04378), algorithm 3."""
    for i, t in enumerate(grid.timesteps):
        alpha, sigma = alpha_sigma(schedule, t)
        output = context.model(x, t, alpha, sigma)
        denoised, _ = denoised_and_noise(schedule, x, output, alpha, sigma)
        denoised = context.clip(denoised)
        scaled_t, sigma_data = t * schedule.timestep_scaling, 0.5
        length = math.hypot(scaled_t, sigma_data)
        c_out, c_skip = scaled_t / length, (sigma_data / length) ** 2
        x = c_out * denoised + c_skip * x
        if i + 1 < len(grid.timesteps):
            alpha, sigma = alpha_sigma(schedule, grid.timesteps[i + 1])
            x = alpha * x + sigma * context.noise()
        x = context.callback(x)
    return x


def sample_tcd(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Strategic stochastic sampling: Zheng et al. 2024 (arXiv:2402.19159), algorithm 4; eta is
    the paper's gamma.
    """
    prev_timesteps = (*grid.timesteps[1:], 0.0)
    for i, (t, t_prev) in enumerate(zip(grid.timesteps, prev_timesteps, strict=True)):
        # In float32, as in diffusers: it decides which integer lies below.
        t_s = float(np.floor(np.float32(1.0 - schedule.eta) * np.float32(t_prev)))
        alpha, sigma = alpha_sigma(schedule, t)
        output = context.model(x, t, alpha, sigma)
        denoised, noise = denoised_and_noise(schedule, x, output, alpha, sigma)
        alpha, sigma = alpha_sigma(schedule, t_s)
        x = alpha * denoised + sigma * noise
        if schedule.eta and i + 1 < len(grid.timesteps):
            ratio = alpha_sigma(schedule, t_prev)[0] / alpha
            x = ratio * x + math.sqrt(1.0 - ratio**2) * context.noise()
        x = context.callback(x)
    return x


def previous_timesteps(schedule: NoiseSchedule, grid: TimestepGrid) -> tuple[float, ...]:
    """The timestep that each step leads to: one stride down, or the next of a custom grid; -1 is
    the end of the run.
    """
    if not grid.evenly_spaced:
        return (*grid.timesteps[1:], -1.0)
    stride = schedule.num_train_timesteps // grid.num_steps
    return tuple(t - stride for t in grid.timesteps)
