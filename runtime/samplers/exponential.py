"""Exponential integrators: DPM-Solver and DPM-Solver++ (multistep, singlestep, with and without
noise), DEIS and UniPC.

- A latent is `x = alpha_t * denoised + sigma_t * noise` with `alpha_t**2 + sigma_t**2 = 1`;
  sigma without an index is `sigma_t / alpha_t`.
- A step is of length h in `lambda = log(alpha_t / sigma_t)`. The linear part of the ODE is solved
  exactly; the integral of the denoised latent (or of the noise) against an exponential is taken
  through the model outputs known so far.

Knows the sigmas of a grid; not how they are spaced.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.errors import UsageError

from .noise_schedule import NoiseSchedule, denoised_and_noise, sigma_to_alpha_sigma
from .protocol import Latent, SolverContext
from .spacing import TimestepGrid

FEW_STEPS = 15  # below this many, `lower_order_final` applies
MIN_LAMBDA_STEP = 1e-9  # shorter: the last sigma repeats the one before


def add_noise_scales(schedule: NoiseSchedule, grid: TimestepGrid) -> tuple[float, float]:
    """Factors of the image and of the noise in the latents at the grid's first timestep."""
    return sigma_to_alpha_sigma(grid.sigmas[0])


def init_noise_sigma(schedule: NoiseSchedule, grid: TimestepGrid) -> float:
    """Standard deviation of the initial noise when there is no image to start from."""
    return 1.0


@dataclass(frozen=True, slots=True)
class ExponentialStep:
    """The coefficients of one step from a sigma to the next.

    Attributes:
        x_scale: Factor of x.
        output_scale: Factor of the weighted sum of model outputs.
        exponent: Exponent of the integrand over the full step: -h for denoised latents, h for
            noise, -2 h where noise is added back.
        noise_std: Standard deviation of the noise added back.
    """

    x_scale: float
    output_scale: float
    exponent: float
    noise_std: float

    @property
    def phi_1(self) -> float:
        """Weight of the output itself; the phi functions are those of the DPM-Solver papers."""
        return abs(math.expm1(self.exponent))

    @property
    def phi_2(self) -> float:
        """Weight of the first derivative in lambda, in units of h."""
        sign = math.copysign(1.0, self.exponent)
        return sign * (math.expm1(self.exponent) / self.exponent - 1.0)

    @property
    def phi_3(self) -> float:
        """Weight of the second derivative in lambda, in units of h**2."""
        sign = math.copysign(1.0, self.exponent)
        return sign * ((math.expm1(self.exponent) - self.exponent) / self.exponent**2 - 0.5)


def exponential_step(schedule: NoiseSchedule, sigma: float, sigma_next: float) -> ExponentialStep:
    """Lu et al. 2022: (arXiv:2206.00927), eq. 3.7 for noise; (arXiv:2211.01095), eqs. 9 and 18."""
    h = math.log(sigma / sigma_next) if sigma_next > 0.0 else math.inf
    alpha_t, sigma_t = sigma_to_alpha_sigma(sigma)
    alpha_t_next, sigma_t_next = sigma_to_alpha_sigma(sigma_next)
    kind = schedule.algorithm_type
    if kind == "dpmsolver++":
        return ExponentialStep(sigma_t_next / sigma_t, alpha_t_next, -h, 0.0)
    if kind == "sde-dpmsolver++":
        noise_std = sigma_t_next * math.sqrt(-math.expm1(-2.0 * h))
        return ExponentialStep(
            sigma_t_next / sigma_t * math.exp(-h), alpha_t_next, -2.0 * h, noise_std
        )
    if kind == "dpmsolver":
        return ExponentialStep(alpha_t_next / alpha_t, -sigma_t_next, h, 0.0)
    noise_std = sigma_t_next * math.sqrt(math.expm1(2.0 * h))
    return ExponentialStep(alpha_t_next / alpha_t, -2.0 * sigma_t_next, h, noise_std)


def convert_model_output(
    schedule: NoiseSchedule, context: SolverContext, x: Latent, timestep: float, sigma: float
) -> Latent:
    """Evaluate the model once; returns what the integral is over, the denoised latent or noise."""
    return denoise(schedule, context, x, timestep, sigma)[0 if predicts_x0(schedule) else 1]


def denoise(
    schedule: NoiseSchedule, context: SolverContext, x: Latent, timestep: float, sigma: float
) -> tuple[Latent, Latent]:
    """Evaluate the model once; returns the denoised latent and the noise in x."""
    alpha_t, sigma_t = sigma_to_alpha_sigma(sigma)
    return denoised_and_noise(
        schedule, x, context.model(x, timestep, alpha_t, sigma_t), alpha_t, sigma_t
    )


def predicts_x0(schedule: NoiseSchedule) -> bool:
    return schedule.algorithm_type.endswith("++")


def check_options(schedule: NoiseSchedule, grid: TimestepGrid) -> None:
    if grid.sigmas[-1] == 0.0 and not predicts_x0(schedule):
        raise UsageError(
            f"algorithm_type {schedule.algorithm_type} cannot end at a sigma of 0",
            hint="set final_sigmas_type to sigma_min",
        )
    if schedule.algorithm_type == "sde-dpmsolver" and schedule.solver_order == 3:
        raise UsageError(
            "algorithm_type sde-dpmsolver has no third order", hint="set solver_order to 2"
        )


def sample_dpm_multistep(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """DPM-Solver++ multistep: Lu et al. 2022 (arXiv:2211.01095), algorithm 2 and appendix B."""
    check_options(schedule, grid)
    outputs: list[Latent] = []
    sigmas, count = grid.sigmas, len(grid.timesteps)
    for i, t in enumerate(grid.timesteps):
        outputs = [convert_model_output(schedule, context, x, t, sigmas[i]), *outputs[:2]]
        order = min(schedule.solver_order, len(outputs))
        if schedule.lower_order_final and grid.num_steps < FEW_STEPS:
            order = min(order, count - i)
        if i + 1 == count and (schedule.euler_at_final or sigmas[-1] == 0.0):
            order = 1
        ratios = lambda_ratios(sigmas[i], sigmas[i + 1], [sigmas[i - k] for k in range(order)])
        step = exponential_step(schedule, sigmas[i], sigmas[i + 1])
        # The authors' multistep code uses half the second derivative, their singlestep code all.
        x = dpm_solver_update(schedule, step, x, outputs[:order], ratios, curvature=1.0)
        x = context.callback(add_noise(x, step, schedule, context))
    return x


def lambda_ratios(sigma: float, sigma_next: float, sigmas: Sequence[float]) -> list[float]:
    """Positions of sigmas in a step, in lambda: 0 is its start, 1 its end (`r` in the papers)."""
    h = lambda_step(sigma, sigma_next)
    return [lambda_step(sigma, other) / h if other != sigma else 0.0 for other in sigmas]


def lambda_step(sigma: float, sigma_next: float) -> float:
    """The step h in lambda from one sigma to another; infinite when the last one is 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0.0 else math.inf


def add_noise(
    x: Latent, step: ExponentialStep, schedule: NoiseSchedule, context: SolverContext
) -> Latent:
    if schedule.algorithm_type.startswith("sde"):
        return x + step.noise_std * context.noise()
    return x


def dpm_solver_update(
    schedule: NoiseSchedule,
    step: ExponentialStep,
    x: Latent,
    outputs: Sequence[Latent],
    ratios: Sequence[float],
    curvature: float,
) -> Latent:
    """x after the step.

    Args:
        outputs: Converted model outputs, the first at the step's start.
        ratios: Their positions in the step.
        curvature: Factor that turns the second divided difference into the second derivative.
    """
    if abs(step.exponent) < MIN_LAMBDA_STEP:
        return x
    combined = step.phi_1 * outputs[0]
    if len(outputs) == 2:
        d1 = (1.0 / ratios[1]) * (outputs[1] - outputs[0])
        midpoint = schedule.solver_type != "heun"
        combined = combined + (0.5 * step.phi_1 if midpoint else step.phi_2) * d1
    if len(outputs) == 3:
        first, second = lambda_derivatives(outputs, ratios)
        combined = combined + step.phi_2 * first + (curvature * step.phi_3) * second
    return step.x_scale * x + step.output_scale * combined


def lambda_derivatives(outputs: Sequence[Latent], ratios: Sequence[float]) -> tuple[Latent, Latent]:
    """The first derivative at the first of three positions, and the second divided difference."""
    near = (1.0 / (ratios[1] - ratios[0])) * (outputs[1] - outputs[0])
    far = (1.0 / (ratios[2] - ratios[1])) * (outputs[2] - outputs[1])
    second = (1.0 / (ratios[2] - ratios[0])) * (far - near)
    return near + (ratios[0] - ratios[1]) * second, second


def sample_dpm_singlestep(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """DPM-Solver singlestep: Lu et al. 2022 (arXiv:2206.00927), algorithms 1 and 2, and
    (arXiv:2211.01095), algorithm 1. Every step of a group starts from the group's first latent.
    """
    check_options(schedule, grid)
    ends_at_zero = grid.sigmas[-1] == 0.0
    orders = get_order_list(schedule, grid.num_steps, ends_at_zero)[grid.skipped :]
    sigmas = grid.sigmas
    group: list[tuple[float, Latent]] = []
    origin = x
    for i, t in enumerate(grid.timesteps):
        value = convert_model_output(schedule, context, x, t, sigmas[i])
        order = min(orders[i], len(group) + 1)
        if order == 1:
            group, origin = [], x
        group.append((sigmas[i], value))
        used = group[-order:]
        step = exponential_step(schedule, used[0][0], sigmas[i + 1])
        ratios = lambda_ratios(used[0][0], sigmas[i + 1], [sigma for sigma, _ in used])
        outputs = [output for _, output in used]
        if order == 3 and schedule.solver_type != "heun":  # the middle output is not used
            d1 = (1.0 / ratios[2]) * (outputs[2] - outputs[0])
            combined = step.phi_1 * outputs[0] + step.phi_2 * d1
            x = step.x_scale * origin + step.output_scale * combined
        else:
            x = dpm_solver_update(schedule, step, origin, outputs, ratios, curvature=2.0)
        x = context.callback(add_noise(x, step, schedule, context))
    return x


def get_order_list(schedule: NoiseSchedule, steps: int, ends_at_zero: bool) -> list[int]:
    """The order of each step: groups of 1, 2, .. up to the solver's order, ending low."""
    order = schedule.solver_order
    divisible = steps % order == 0 and not ends_at_zero
    if schedule.lower_order_final or not divisible:
        groups = (steps - 1) // order if order == 2 else steps // 3 - (steps % 3 == 0)
        remainder = steps - groups * order
        tail = {1: [1], 2: [1, 2] if order == 3 else [1, 1], 3: [1, 2, 1]}
        orders = [1] * steps if order == 1 else [*range(1, order + 1)] * groups + tail[remainder]
    else:
        orders = [*range(1, order + 1)] * (steps // order)
    if ends_at_zero:
        orders[-1] = 1
    return orders


def sample_deis(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Diffusion exponential integrator: Zhang and Chen 2022 (arXiv:2204.13902), eq. 15, its
    polynomial in log(sigma).
    """
    sigmas, count = grid.sigmas, len(grid.timesteps)
    outputs: list[Latent] = []
    for i, t in enumerate(grid.timesteps):
        _, noise = denoise(schedule, context, x, t, sigmas[i])
        outputs = [noise, *outputs[:2]]
        order = min(schedule.solver_order, len(outputs))
        if schedule.lower_order_final and grid.num_steps < FEW_STEPS:
            order = min(order, count - i)
        nodes = [math.log(sigmas[i - k]) for k in range(order)]
        bounds = nodes[0], math.log(sigmas[i + 1])
        x = (1.0 / sigma_to_alpha_sigma(sigmas[i])[0]) * x
        for k in range(order):
            x = x + exponential_integral(nodes, k, *bounds) * outputs[k]
        x = context.callback(sigma_to_alpha_sigma(sigmas[i + 1])[0] * x)
    return x


def exponential_integral(nodes: Sequence[float], k: int, low: float, high: float) -> float:
    """The integral of `p(u) exp(u)` from low to high, p the polynomial that is 1 at node k and 0
    at the others: `exp(u) (p - p' + p'')` for a polynomial of second degree.
    """
    c0, c1, c2 = 1.0, 0.0, 0.0
    for i, node in enumerate(nodes):
        if i != k:
            factor = 1.0 / (nodes[k] - node)
            c0, c1, c2 = -node * factor * c0, factor * (c0 - node * c1), factor * (c1 - node * c2)

    def antiderivative(u: float) -> float:
        return math.exp(u) * ((c0 - c1 + 2.0 * c2) + (c1 - 2.0 * c2) * u + c2 * u * u)

    return antiderivative(high) - antiderivative(low)


def sample_unipc(
    schedule: NoiseSchedule, grid: TimestepGrid, x: Latent, context: SolverContext
) -> Latent:
    """Unified predictor-corrector: Zhao et al. 2023 (arXiv:2302.04867), algorithms 5 to 8.

    Predictor and corrector share their first terms, so the corrected latents are the predicted
    ones minus one residual plus another; a change that the callback made in between stays.
    """
    sigmas, count = grid.sigmas, len(grid.timesteps)
    outputs: list[Latent] = []
    order, residual = 0, 0.0 * x
    for i, t in enumerate(grid.timesteps):
        value = denoise(schedule, context, x, t, sigmas[i])[0 if schedule.predict_x0 else 1]
        if i > 0 and grid.skipped + i - 1 not in schedule.disable_corrector:
            corrected = unipc_residual(schedule, outputs[:order], sigmas, i - 1, value)
            x = x - residual + corrected
        outputs = [value, *outputs[:2]]
        order = min(schedule.solver_order, len(outputs))
        if schedule.lower_order_final:
            order = min(order, count - i)
        elif sigmas[i + 1] == 0.0 and order > 1:
            raise UsageError(
                "lower_order_final=false cannot end at a sigma of 0",
                hint="set final_sigmas_type to sigma_min",
            )
        x_scale, output_scale, exponent = unipc_step(schedule, sigmas[i], sigmas[i + 1])
        residual = unipc_residual(schedule, outputs[:order], sigmas, i, None)
        x = context.callback(x_scale * x + output_scale * math.expm1(exponent) * value + residual)
    return x


def unipc_step(
    schedule: NoiseSchedule, sigma: float, sigma_next: float
) -> tuple[float, float, float]:
    """Factors of x and of the outputs, and the exponent of the integral."""
    h = lambda_step(sigma, sigma_next)
    alpha_t, sigma_t = sigma_to_alpha_sigma(sigma)
    alpha_t_next, sigma_t_next = sigma_to_alpha_sigma(sigma_next)
    if schedule.predict_x0:
        return sigma_t_next / sigma_t, -alpha_t_next, -h
    return alpha_t_next / alpha_t, -sigma_t_next, h


def unipc_residual(
    schedule: NoiseSchedule,
    outputs: Sequence[Latent],
    sigmas: Sequence[float],
    i: int,
    end: Latent | None,
) -> Latent:
    """The terms of a step from sigma i beyond first order: the predictor's, or the corrector's if
    the output at the step's end is given. `outputs` are newest first, from sigma i on.
    """
    _, output_scale, exponent = unipc_step(schedule, sigmas[i], sigmas[i + 1])
    zero = 0.0 * outputs[0]
    if abs(exponent) < MIN_LAMBDA_STEP:
        return zero
    ratios = lambda_ratios(sigmas[i], sigmas[i + 1], [sigmas[i - k] for k in range(len(outputs))])[
        1:
    ]
    d1s = [(1.0 / r) * (v - outputs[0]) for r, v in zip(ratios, outputs[1:], strict=True)]
    if end is not None:
        ratios, d1s = [*ratios, 1.0], [*d1s, end - outputs[0]]
    if not d1s:
        return zero
    scale = math.expm1(exponent) if schedule.solver_type != "bh1" else exponent
    rhos = unipc_rhos(ratios, exponent, scale)
    if len(d1s) == 1:
        rhos = [0.5]
    sums = [output_scale * scale * rho * d1 for rho, d1 in zip(rhos, d1s, strict=True)]
    return sum(sums[1:], sums[0])


def unipc_rhos(ratios: Sequence[float], exponent: float, scale: float) -> list[float]:
    """The paper's `R^-1 b` (eq. 11): weights that make the step exact for polynomials."""
    phi, factorial, b = math.expm1(exponent) / exponent - 1.0, 1.0, []
    for n in range(len(ratios)):
        b.append(phi * factorial / scale)
        factorial *= n + 2
        phi = phi / exponent - 1.0 / factorial
    matrix = np.vander(ratios, increasing=True).T
    rhos: list[float] = np.linalg.solve(matrix, b).tolist()
    return rhos
