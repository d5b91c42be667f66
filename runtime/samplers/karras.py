"""Solvers in the form of Karras et al. 2022 (arXiv:2206.00364): Euler, Heun, DPM2, their ancestral
variants, LMS, DPM++ SDE and DPM++ 2S ancestral.

- A latent is `x = denoised + sigma * noise`; the model gets `x / sqrt(sigma**2 + 1)`.
- The probability flow ODE is `dx / dsigma = (x - denoised) / sigma`, which is the noise in x.
- Each `sample_*` is the method of the same name in k-diffusion.

Knows the sigmas of a grid; not how they are spaced.
"""

import math

import numpy as np

from .noise_schedule import NoiseSchedule, denoised_and_noise, sigma_to_alpha_sigma
from .protocol import Latent, SolverContext
from .spacing import TimestepGrid, sigmas_to_timesteps


def add_noise_scales(schedule: NoiseSchedule, grid: TimestepGrid) -> tuple[float, float]:
    """Factors of the image and of the noise in the latents at the grid's first timestep."""
    return 1.0, grid.sigmas[0]


def init_noise_sigma(schedule: NoiseSchedule, grid: TimestepGrid) -> float:
    """Standard deviation of the initial noise when there is no image to start from."""
    if schedule.sigma_schedule or schedule.timestep_spacing in ("linspace", "trailing"):
        return grid.sigmas[0]
    return math.hypot(grid.sigmas[0], 1.0)


def denoise(
    schedule: NoiseSchedule, context: SolverContext, x: Latent, timestep: float, sigma: float
) -> tuple[Latent, Latent]:
    """Evaluate the model once; returns the denoised latent and the noise in x."""
    alpha_t, sigma_t = sigma_to_alpha_sigma(sigma)
    scaled = alpha_t * x
    output = context.model(scaled, timestep, alpha_t, sigma_t)
    return denoised_and_noise(schedule, scaled, output, alpha_t, sigma_t)


def sample_euler(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Euler's method: Karras et al. 2022, algorithm 1 without the second-order correction."""
    sigmas = grid.sigmas
    for t, sigma, sigma_next in zip(grid.timesteps, sigmas, sigmas[1:], strict=False):
        _, noise = denoise(schedule, context, x, t, sigma)
        x = context.callback(x + (sigma_next - sigma) * noise)
    return x


def sample_heun(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Heun's method: Karras et al. 2022, algorithm 1. The last step, to sigma 0, is Euler's."""
    sigmas, timesteps = grid.sigmas, grid.timesteps
    for i, (t, sigma, sigma_next) in enumerate(zip(timesteps, sigmas, sigmas[1:], strict=False)):
        _, d = denoise(schedule, context, x, t, sigma)
        x_mid = context.callback(x + (sigma_next - sigma) * d)
        if sigma_next == 0.0 or i + 1 == len(timesteps):
            return x_mid
        _, d_next = denoise(schedule, context, x_mid, timesteps[i + 1], sigma_next)
        x = context.callback(x + (sigma_next - sigma) * 0.5 * (d + d_next))
    return x


def sample_dpm_2(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """The midpoint method in log sigma: Karras et al. 2022, algorithm 2 without churn, and
    DPM-Solver-2 of Lu et al. 2022 (arXiv:2206.00927).
    """
    sigmas = grid.sigmas
    for t, sigma, sigma_next in zip(grid.timesteps, sigmas, sigmas[1:], strict=False):
        _, noise = denoise(schedule, context, x, t, sigma)
        if sigma_next == 0.0:
            return context.callback(x - sigma * noise)
        sigma_mid = math.sqrt(sigma * sigma_next)
        x_mid = context.callback(x + (sigma_mid - sigma) * noise)
        _, noise = denoise(
            schedule, context, x_mid, sigma_to_timestep(schedule, sigma_mid), sigma_mid
        )
        x = context.callback(x + (sigma_next - sigma) * noise)
    return x


def sample_euler_ancestral(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """An Euler step to `sigma_down`, then noise of deviation `sigma_up`."""
    sigmas = grid.sigmas
    for t, sigma, sigma_next in zip(grid.timesteps, sigmas, sigmas[1:], strict=False):
        _, noise = denoise(schedule, context, x, t, sigma)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, schedule.eta)
        x = context.callback(x + (sigma_down - sigma) * noise + sigma_up * context.noise())
    return x


def sample_dpm_2_ancestral(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """A DPM2 step to `sigma_down`, then noise of deviation `sigma_up`."""
    sigmas = grid.sigmas
    for t, sigma, sigma_next in zip(grid.timesteps, sigmas, sigmas[1:], strict=False):
        _, noise = denoise(schedule, context, x, t, sigma)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, schedule.eta)
        if sigma_down == 0.0:
            return context.callback(x - sigma * noise)
        sigma_mid = math.sqrt(sigma * sigma_down)
        x_mid = context.callback(x + (sigma_mid - sigma) * noise)
        _, noise = denoise(
            schedule, context, x_mid, sigma_to_timestep(schedule, sigma_mid), sigma_mid
        )
        x = context.callback(x + (sigma_down - sigma) * noise + sigma_up * context.noise())
    return x


def sample_dpmpp_sde(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """DPM-Solver++ (SDE) of two evaluations: Lu et al. 2022 (arXiv:2211.01095) in Karras's form.

    Both stages of a step read one Brownian path over sigma: the noise of the full step is that of
    its two parts, weighted by the square roots of their lengths.
    """
    if schedule.algorithm_type == "ancestral":
        return sample_dpmpp_2s_ancestral(schedule, grid, x, context)
    sigmas = grid.sigmas
    for t, sigma, sigma_next in zip(grid.timesteps, sigmas, sigmas[1:], strict=False):
        denoised, noise = denoise(schedule, context, x, t, sigma)
        if sigma_next == 0.0:
            return context.callback(x - sigma * noise)
        sigma_mid = math.sqrt(sigma * sigma_next)
        first, second = context.noise(), context.noise()
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_mid, schedule.eta)
        x_mid = (sigma_down / sigma) * x + (1.0 - sigma_down / sigma) * denoised + sigma_up * first
        t_mid = sigma_to_timestep(schedule, sigma_mid)
        denoised, _ = denoise(schedule, context, context.callback(x_mid), t_mid, sigma_mid)
        fraction = (sigma - sigma_mid) / (sigma - sigma_next)
        path = math.sqrt(fraction) * first + math.sqrt(1.0 - fraction) * second
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, schedule.eta)
        x = context.callback(
            (sigma_down / sigma) * x + (1.0 - sigma_down / sigma) * denoised + sigma_up * path
        )
    return x


def sample_dpmpp_2s_ancestral(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """A DPM-Solver++(2S) step to `sigma_down`, then noise of deviation `sigma_up`: Lu et al. 2022
    (arXiv:2211.01095), algorithm 1 with the midpoint in log sigma.
    """
    sigmas = grid.sigmas
    for t, sigma, sigma_next in zip(grid.timesteps, sigmas, sigmas[1:], strict=False):
        denoised, noise = denoise(schedule, context, x, t, sigma)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next, schedule.eta)
        if sigma_down == 0.0:
            return context.callback(x - sigma * noise)
        sigma_mid = math.sqrt(sigma * sigma_down)
        x_mid = context.callback((sigma_mid / sigma) * x + (1.0 - sigma_mid / sigma) * denoised)
        t_mid = sigma_to_timestep(schedule, sigma_mid)
        denoised, _ = denoise(schedule, context, x_mid, t_mid, sigma_mid)
        x = (sigma_down / sigma) * x + (1.0 - sigma_down / sigma) * denoised
        x = context.callback(x + sigma_up * context.noise())
    return x


def get_ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """`sigma_down` to step to and `sigma_up` of the noise added after it, so that their squares add
    up to `sigma_next**2`. eta scales the noise: 1 is fully ancestral, 0 deterministic.
    """
    sigma_up = min(
        sigma_next, eta * sigma_next * math.sqrt(max(sigma**2 - sigma_next**2, 0.0)) / sigma
    )
    return math.sqrt(max(sigma_next**2 - sigma_up**2, 0.0)), sigma_up


def sigma_to_timestep(schedule: NoiseSchedule, sigma: float) -> float:
    return float(sigmas_to_timesteps(schedule, np.array(sigma)))


def sample_lms(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Linear multistep of order four: the polynomial through the last derivatives, integrated over
    sigma (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5).
    """
    derivatives: list[Latent] = []
    sigmas = grid.sigmas
    for i, t in enumerate(grid.timesteps):
        _, noise = denoise(schedule, context, x, t, sigmas[i])
        derivatives = [noise, *derivatives[:3]]
        nodes = [sigmas[i - k] for k in range(len(derivatives))]
        for k, d in enumerate(derivatives):
            x = x + lagrange_integral(nodes, k, sigmas[i], sigmas[i + 1]) * d
        x = context.callback(x)
    return x


# Gauss and Legendre's two nodes integrate cubics exactly.
GAUSS = (0.5 - 0.5 / math.sqrt(3.0), 0.5 + 0.5 / math.sqrt(3.0))


def lagrange_integral(nodes: list[float], k: int, low: float, high: float) -> float:
    """The integral from low to high of the polynomial that is 1 at node k and 0 at the others."""
    total = 0.0
    for node_position in GAUSS:
        at = low + node_position * (high - low)
        others = [node for i, node in enumerate(nodes) if i != k]
        total += math.prod((at - node) / (nodes[k] - node) for node in others)
    return 0.5 * (high - low) * total
