"""Solvers in the log signal-to-noise ratio: DPM-Solver and DPM-Solver++ (multistep, singlestep,
with and without noise), DEIS, UniPC.

A latent is `alpha * clean + sigma * noise`. Over a step of h in `lambda = log(alpha / sigma)` the
linear part of the equation is solved exactly; what is left is an integral of the clean latent (or
of the noise) against an exponential, taken through the outputs known so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.errors import UsageError

from .noise_schedule import NoiseSchedule, alpha_sigma_from_level, clean_and_noise
from .protocol import Latent, Run
from .spacing import TimestepGrid

FEW_STEPS = 15  # below this many, `lower_order_final` applies
NO_STEP = 1e-9  # in lambda: a last level that repeats the one before


def mix(schedule: NoiseSchedule, ladder: TimestepGrid) -> tuple[float, float]:
    """Shares of picture and noise that a run from the ladder's first rung starts with."""
    return alpha_sigma_from_level(ladder.levels[0])


def start(schedule: NoiseSchedule, ladder: TimestepGrid) -> float:
    """The starting noise's standard deviation when there is no picture."""
    return 1.0


@dataclass(frozen=True, slots=True)
class Leap:
    """One step between two levels.

    keep: what x is multiplied by. gain: what the weighted outputs are multiplied by.
    power: the exponent of the integrand over the whole step, -h for clean latents, h for noise;
        twice -h where noise is added back. fresh: the deviation of that noise.
    """

    keep: float
    gain: float
    power: float
    fresh: float

    @property
    def constant(self) -> float:
        """Weight of the value."""
        return abs(math.expm1(self.power))

    @property
    def slope(self) -> float:
        """Weight of the first derivative in lambda, in units of h."""
        sign = math.copysign(1.0, self.power)
        return sign * (math.expm1(self.power) / self.power - 1.0)

    @property
    def bend(self) -> float:
        """Weight of the second derivative in lambda, in units of h**2."""
        sign = math.copysign(1.0, self.power)
        return sign * ((math.expm1(self.power) - self.power) / self.power**2 - 0.5)


def leap(schedule: NoiseSchedule, level: float, after: float) -> Leap:
    """Lu et al. 2022: (arXiv:2206.00927), eq. 3.7 for noise; (arXiv:2211.01095), eqs. 9 and 18."""
    h = math.log(level / after) if after > 0.0 else math.inf
    alpha, sigma = alpha_sigma_from_level(level)
    alpha_after, sigma_after = alpha_sigma_from_level(after)
    kind = schedule.algorithm_type
    if kind == "dpmsolver++":
        return Leap(sigma_after / sigma, alpha_after, -h, 0.0)
    if kind == "sde-dpmsolver++":
        fresh = sigma_after * math.sqrt(-math.expm1(-2.0 * h))
        return Leap(sigma_after / sigma * math.exp(-h), alpha_after, -2.0 * h, fresh)
    if kind == "dpmsolver":
        return Leap(alpha_after / alpha, -sigma_after, h, 0.0)
    fresh = sigma_after * math.sqrt(math.expm1(2.0 * h))
    return Leap(alpha_after / alpha, -2.0 * sigma_after, h, fresh)


def predicted(
    schedule: NoiseSchedule, run: Run, x: Latent, timestep: float, level: float
) -> Latent:
    """One evaluation: what the integral is over, the clean latent or the noise."""
    return evaluated(schedule, run, x, timestep, level)[0 if over_clean(schedule) else 1]


def evaluated(
    schedule: NoiseSchedule, run: Run, x: Latent, timestep: float, level: float
) -> tuple[Latent, Latent]:
    """One evaluation: the clean latent and the noise in x."""
    alpha, sigma = alpha_sigma_from_level(level)
    return clean_and_noise(schedule, x, run.output(x, timestep, alpha, sigma), alpha, sigma)


def over_clean(schedule: NoiseSchedule) -> bool:
    return schedule.algorithm_type.endswith("++")


def check(schedule: NoiseSchedule, ladder: TimestepGrid) -> None:
    if ladder.levels[-1] == 0.0 and not over_clean(schedule):
        raise UsageError(
            f"algorithm_type {schedule.algorithm_type} cannot end at no noise; "
            "set final_sigmas_type to sigma_min"
        )
    if schedule.algorithm_type == "sde-dpmsolver" and schedule.solver_order == 3:
        raise UsageError("algorithm_type sde-dpmsolver has no third order; set solver_order to 2")


def dpm_multistep(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """DPM-Solver++ multistep: Lu et al. 2022 (arXiv:2211.01095), algorithm 2 and appendix B."""
    check(schedule, ladder)
    known: list[Latent] = []
    levels, count = ladder.levels, len(ladder.timesteps)
    for i, t in enumerate(ladder.timesteps):
        known = [predicted(schedule, run, x, t, levels[i]), *known[:2]]
        order = min(schedule.solver_order, len(known))
        if schedule.lower_order_final and ladder.total < FEW_STEPS:
            order = min(order, count - i)
        if i + 1 == count and (schedule.euler_at_final or levels[-1] == 0.0):
            order = 1
        past = places(levels[i], levels[i + 1], [levels[i - k] for k in range(order)])
        step = leap(schedule, levels[i], levels[i + 1])
        # The authors' multistep code takes half the second derivative; their singlestep, all.
        x = advance(schedule, step, x, known[:order], past, curvature=1.0)
        x = run.edited(with_noise(x, step, schedule, run))
    return x


def places(level: float, after: float, levels: Sequence[float]) -> list[float]:
    """Levels as places of a step from `level` to `after`: 0 its start, 1 its end, in lambda."""
    h = log_step(level, after)
    return [log_step(level, other) / h if other != level else 0.0 for other in levels]


def log_step(level: float, after: float) -> float:
    """The step in lambda from one level to another; infinite when nothing of the noise is left."""
    return math.log(level / after) if after > 0.0 else math.inf


def with_noise(x: Latent, step: Leap, schedule: NoiseSchedule, run: Run) -> Latent:
    if schedule.algorithm_type.startswith("sde"):
        return x + step.fresh * run.noise()
    return x


def advance(
    schedule: NoiseSchedule,
    step: Leap,
    x: Latent,
    values: Sequence[Latent],
    at: Sequence[float],
    curvature: float,
) -> Latent:
    """x after the step, from values at places `at`, the first the step's start.

    curvature: what the second divided difference is multiplied by for the second derivative.
    """
    if abs(step.power) < NO_STEP:
        return x
    mixed = step.constant * values[0]
    if len(values) == 2:
        slope = (1.0 / at[1]) * (values[1] - values[0])
        middle = schedule.solver_type != "heun"
        mixed = mixed + (0.5 * step.constant if middle else step.slope) * slope
    if len(values) == 3:
        first, second = derivatives(values, at)
        mixed = mixed + step.slope * first + (curvature * step.bend) * second
    return step.keep * x + step.gain * mixed


def derivatives(values: Sequence[Latent], at: Sequence[float]) -> tuple[Latent, Latent]:
    """The first derivative at the first of three places, and the second divided difference."""
    near = (1.0 / (at[1] - at[0])) * (values[1] - values[0])
    far = (1.0 / (at[2] - at[1])) * (values[2] - values[1])
    second = (1.0 / (at[2] - at[0])) * (far - near)
    return near + (at[0] - at[1]) * second, second


def dpm_singlestep(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """DPM-Solver singlestep: Lu et al. 2022 (arXiv:2206.00927), algorithms 1 and 2, and
    (arXiv:2211.01095), algorithm 1. A group of steps starts again from its first latent.
    """
    check(schedule, ladder)
    ends_clean = ladder.levels[-1] == 0.0
    orders = single_orders(schedule, ladder.total, ends_clean)[ladder.skipped :]
    levels = ladder.levels
    group: list[tuple[float, Latent]] = []
    origin = x
    for i, t in enumerate(ladder.timesteps):
        value = predicted(schedule, run, x, t, levels[i])
        order = min(orders[i], len(group) + 1)
        if order == 1:
            group, origin = [], x
        group.append((levels[i], value))
        used = group[-order:]
        step = leap(schedule, used[0][0], levels[i + 1])
        at = places(used[0][0], levels[i + 1], [level for level, _ in used])
        values = [kept for _, kept in used]
        if order == 3 and schedule.solver_type != "heun":  # the middle value is passed over
            slope = (1.0 / at[2]) * (values[2] - values[0])
            mixed = step.constant * values[0] + step.slope * slope
            x = step.keep * origin + step.gain * mixed
        else:
            x = advance(schedule, step, origin, values, at, curvature=2.0)
        x = run.edited(with_noise(x, step, schedule, run))
    return x


def single_orders(schedule: NoiseSchedule, steps: int, ends_clean: bool) -> list[int]:
    """The order of each step: groups of 1, 2, .. up to the solver's, ending low."""
    order = schedule.solver_order
    even = steps % order == 0 and not ends_clean
    if schedule.lower_order_final or not even:
        groups = (steps - 1) // order if order == 2 else steps // 3 - (steps % 3 == 0)
        rest = steps - groups * order
        tail = {1: [1], 2: [1, 2] if order == 3 else [1, 1], 3: [1, 2, 1]}
        orders = [1] * steps if order == 1 else [*range(1, order + 1)] * groups + tail[rest]
    else:
        orders = [*range(1, order + 1)] * (steps // order)
    if ends_clean:
        orders[-1] = 1
    return orders


def deis(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Diffusion exponential integrator: Zhang and Chen 2022 (arXiv:2204.13902), eq. 15, its
    polynomial taken over the logarithm of the level.
    """
    levels, count = ladder.levels, len(ladder.timesteps)
    known: list[Latent] = []
    for i, t in enumerate(ladder.timesteps):
        _, noise = evaluated(schedule, run, x, t, levels[i])
        known = [noise, *known[:2]]
        order = min(schedule.solver_order, len(known))
        if schedule.lower_order_final and ladder.total < FEW_STEPS:
            order = min(order, count - i)
        nodes = [math.log(levels[i - k]) for k in range(order)]
        ends = nodes[0], math.log(levels[i + 1])
        x = (1.0 / alpha_sigma_from_level(levels[i])[0]) * x
        for k in range(order):
            x = x + exponential_integral(nodes, k, *ends) * known[k]
        x = run.edited(alpha_sigma_from_level(levels[i + 1])[0] * x)
    return x


def exponential_integral(nodes: Sequence[float], k: int, low: float, high: float) -> float:
    """The integral of `p(u) exp(u)` from low to high, p the polynomial that is 1 at node k and 0
    at the others: `exp(u) (p - p' + p'')` for a polynomial of second degree.
    """
    c0, c1, c2 = 1.0, 0.0, 0.0
    for i, node in enumerate(nodes):
        if i != k:
            share = 1.0 / (nodes[k] - node)
            c0, c1, c2 = -node * share * c0, share * (c0 - node * c1), share * (c1 - node * c2)

    def whole(u: float) -> float:
        return math.exp(u) * ((c0 - c1 + 2.0 * c2) + (c1 - 2.0 * c2) * u + c2 * u * u)

    return whole(high) - whole(low)


def unipc(schedule: NoiseSchedule, ladder: TimestepGrid, x: Latent, run: Run) -> Latent:
    """Unified predictor-corrector: Zhao et al. 2023 (arXiv:2302.04867), algorithms 5 to 8.

    Predictor and corrector begin alike, so the corrected latents are the predicted ones with one
    sum taken away and another added; what the caller changed in between stays.
    """
    levels, count = ladder.levels, len(ladder.timesteps)
    known: list[Latent] = []
    order, predicted_sum = 0, 0.0 * x
    for i, t in enumerate(ladder.timesteps):
        value = evaluated(schedule, run, x, t, levels[i])[0 if schedule.predict_x0 else 1]
        if i > 0 and ladder.skipped + i - 1 not in schedule.disable_corrector:
            corrected = unified_sum(schedule, known[:order], levels, i - 1, value)
            x = x - predicted_sum + corrected
        known = [value, *known[:2]]
        order = min(schedule.solver_order, len(known))
        if schedule.lower_order_final:
            order = min(order, count - i)
        elif levels[i + 1] == 0.0 and order > 1:
            raise UsageError(
                "lower_order_final=false cannot end at no noise; set final_sigmas_type to sigma_min"
            )
        keep, gain, power = unified_step(schedule, levels[i], levels[i + 1])
        predicted_sum = unified_sum(schedule, known[:order], levels, i, None)
        x = run.edited(keep * x + gain * math.expm1(power) * value + predicted_sum)
    return x


def unified_step(schedule: NoiseSchedule, level: float, after: float) -> tuple[float, float, float]:
    """What x is multiplied by, what the outputs are, and the exponent of their integral."""
    h = log_step(level, after)
    alpha, sigma = alpha_sigma_from_level(level)
    alpha_after, sigma_after = alpha_sigma_from_level(after)
    if schedule.predict_x0:
        return sigma_after / sigma, -alpha_after, -h
    return alpha_after / alpha, -sigma_after, h


def unified_sum(
    schedule: NoiseSchedule,
    values: Sequence[Latent],
    levels: Sequence[float],
    i: int,
    end: Latent | None,
) -> Latent:
    """What the slopes add to the step from level i to the next: a predictor's, or with the value
    at the step's end a corrector's. `values` are newest first from level i on.
    """
    _, gain, power = unified_step(schedule, levels[i], levels[i + 1])
    nothing = 0.0 * values[0]
    if abs(power) < NO_STEP:
        return nothing
    at = places(levels[i], levels[i + 1], [levels[i - k] for k in range(len(values))])[1:]
    slopes = [(1.0 / r) * (v - values[0]) for r, v in zip(at, values[1:], strict=True)]
    if end is not None:
        at, slopes = [*at, 1.0], [*slopes, end - values[0]]
    if not slopes:
        return nothing
    scale = math.expm1(power) if schedule.solver_type != "bh1" else power
    weights = unified_weights(at, power, scale)
    if len(slopes) == 1:
        weights = [0.5]
    sums = [gain * scale * w * slope for w, slope in zip(weights, slopes, strict=True)]
    return sum(sums[1:], sums[0])


def unified_weights(at: Sequence[float], power: float, scale: float) -> list[float]:
    """The paper's R^-1 b (eq. 11): weights that make the step exact for polynomials."""
    phi, factorial, right = math.expm1(power) / power - 1.0, 1.0, []
    for n in range(len(at)):
        right.append(phi * factorial / scale)
        factorial *= n + 2
        phi = phi / power - 1.0 / factorial
    matrix = np.vander(at, increasing=True).T
    solved: list[float] = np.linalg.solve(matrix, right).tolist()
    return solved
