"""The timesteps and sigmas of a run, one grid function for each kind of solver.

- Timestep spacings: Lin et al. 2023 (arXiv:2305.08891), table 2.
- Sigma schedules: Karras et al. 2022 (arXiv:2206.00364), eq. 5, and those in `sigmas.py`.

Knows the noise schedule; no solver.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from sdrt.errors import UsageError

from .noise_schedule import NoiseSchedule, max_sigma_float32, training_sigmas
from .sigmas import SIGMA_SCHEDULES, beta_sigmas, exponential_sigmas, karras_sigmas


@dataclass(frozen=True, slots=True)
class TimestepGrid:
    """The timesteps and sigmas of a run.

    Attributes:
        timesteps: N, descending, one per step.
        sigmas: N + 1; sigmas[i] is that of step i, the last that of the result. Empty for discrete
            solvers.
        num_steps: Steps of the full run, of which the first `skipped` are left out.
        skipped: Steps left out at the start.
        evenly_spaced: Whether the timesteps keep one stride; False where the caller chose them.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    num_steps: int
    skipped: int = 0
    evenly_spaced: bool = True

    def skip(self, count: int) -> "TimestepGrid":
        """The grid without its first `count` steps."""
        return replace(
            self,
            timesteps=self.timesteps[count:],
            sigmas=self.sigmas[count:],
            skipped=self.skipped + count,
        )


def discrete_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """Integer timesteps without sigmas: DDIM, DDPM, PNDM."""
    return TimestepGrid(tuple(spaced_timesteps(schedule, steps).round().tolist()), (), steps)


def lcm_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """A subset of the timesteps that a consistency model was distilled on: LCM, TCD (Luo et al.
    2023, arXiv:2310.04378, section 4.3).
    """
    count = schedule.original_inference_steps
    if steps > count:
        raise UsageError(
            f"{steps} steps; expected at most original_inference_steps={count}",
            hint="set fewer steps or a larger original_inference_steps",
        )
    stride = schedule.num_train_timesteps // count
    trained = np.arange(count, 0, -1) * stride - 1
    chosen = np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)
    return TimestepGrid(tuple(trained[chosen].astype(float).tolist()), (), steps)


def karras_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """Sigmas of the spaced timesteps, then 0: the solvers of `karras.py`. Karras, exponential and
    beta sigmas lie between those of the first and the last timestep.
    """
    timesteps = spaced_timesteps(schedule, steps)
    sigmas = timesteps_to_sigmas(schedule, timesteps)
    if schedule.interpolation_type == "log_linear":
        low, high = np.log(training_sigmas(schedule)[[0, -1]]).tolist()
        sigmas = np.exp(np.linspace(high, low, steps + 1))
    respaced = respaced_sigmas(schedule, float(sigmas[0]), float(sigmas[-1]), steps)
    if respaced is not None:
        sigmas, timesteps = respaced, sigmas_to_timesteps(schedule, respaced)
    if len(sigmas) == steps:
        sigmas = np.append(sigmas, final_sigma(schedule))
    if schedule.timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        timesteps = 0.25 * np.log(sigmas[:-1])
    return TimestepGrid(tuple(timesteps.tolist()), tuple(sigmas.tolist()), steps)


def dpm2_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """`karras_grid`, with integer timesteps for Karras sigmas: DPM2."""
    grid = karras_grid(schedule, steps)
    if schedule.use_karras_sigmas:
        return replace(grid, timesteps=tuple(np.round(grid.timesteps).tolist()))
    return grid


def exponential_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """Sigmas of one timestep more than steps, whose lowest is replaced by the final sigma: the
    solvers of `exponential.py`. Karras, exponential and beta sigmas span the full noise schedule.
    """
    timesteps = exponential_timesteps(schedule, steps)
    sigmas = timesteps_to_sigmas(schedule, timesteps)
    training = training_sigmas(schedule)
    respaced = respaced_sigmas(schedule, float(training[-1]), float(training[0]), steps)
    if respaced is not None:
        sigmas, timesteps = respaced, sigmas_to_timesteps(schedule, respaced)
        rounded = schedule.use_karras_sigmas or schedule.use_lu_lambdas
        timesteps = timesteps.round() if rounded else truncate_timesteps(schedule, timesteps)
    sigmas = np.append(sigmas, final_sigma(schedule))
    return TimestepGrid(tuple(timesteps.tolist()), tuple(sigmas.tolist()), steps)


def dpm_multistep_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """`exponential_grid`, but timesteps of the cosine schedule are truncated, not rounded."""
    grid = exponential_grid(schedule, steps)
    rounded = schedule.use_karras_sigmas or schedule.use_lu_lambdas
    if schedule.beta_schedule == "squaredcos_cap_v2" and rounded:
        timesteps = truncate_timesteps(
            schedule, sigmas_to_timesteps(schedule, np.array(grid.sigmas[:-1]))
        )
        return replace(grid, timesteps=tuple(timesteps.tolist()))
    return grid


def truncate_timesteps(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """Timesteps truncated to integers. diffusers keeps its sigmas in float32; where
    that rounds the logarithm of the highest sigma up, the highest sigma lies just below its own
    timestep, and the model gets the timestep before.
    """
    truncated = np.trunc(timesteps)
    if timesteps[0] == schedule.num_train_timesteps - 1:
        sigma_max = max_sigma_float32(schedule)
        truncated[0] -= math.log(float(sigma_max)) < float(np.log(sigma_max))
    return truncated


def dpm_singlestep_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """`exponential_grid` with linspace spacing."""
    return exponential_grid(replace(schedule, timestep_spacing="linspace"), steps)


def deis_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """`exponential_grid` that ends at the lowest training sigma; Karras, exponential and beta
    sigmas repeat their own last one.
    """
    grid = exponential_grid(replace(schedule, final_sigmas_type="sigma_min"), steps)
    if respaced_sigmas(schedule, 1.0, 0.5, 1) is None:
        return grid
    return replace(grid, sigmas=(*grid.sigmas[:-1], grid.sigmas[-2]))


def sigma_schedule_grid(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """The sigmas of `sigma_schedule`, whose number may differ from the steps requested."""
    sigmas = SIGMA_SCHEDULES[schedule.sigma_schedule](training_sigmas(schedule), steps)
    timesteps = sigmas_to_timesteps(schedule, sigmas[:-1])
    return TimestepGrid(
        tuple(timesteps.tolist()), tuple(sigmas.tolist()), len(timesteps), evenly_spaced=False
    )


def custom_grid(
    schedule: NoiseSchedule, timesteps: tuple[float, ...] | None, sigmas: tuple[float, ...] | None
) -> TimestepGrid:
    """The caller's own descending timesteps, or descending sigmas including the last."""
    values = np.array(timesteps if sigmas is None else sigmas, np.float64)
    highest = schedule.num_train_timesteps - 1 if sigmas is None else np.inf
    falling = values.ndim == 1 and (np.diff(values) < 0).all()
    if not falling or len(values) < (1 if sigmas is None else 2) or values[-1] < 0:
        kind = "timesteps" if sigmas is None else "sigmas"
        raise UsageError(
            f"{kind} {values.tolist()}; expected descending numbers, the last 0 or above"
        )
    if values[0] > highest:
        raise UsageError(
            f"timestep {values[0]:g}; expected 0 to {highest}, as the model was trained"
        )
    if sigmas is None:
        own_timesteps = values
        own_sigmas = np.append(timesteps_to_sigmas(schedule, values), final_sigma(schedule))
    else:
        own_timesteps, own_sigmas = sigmas_to_timesteps(schedule, values[:-1]), values
    return TimestepGrid(
        tuple(own_timesteps.tolist()),
        tuple(own_sigmas.tolist()),
        len(own_timesteps),
        evenly_spaced=False,
    )


def spaced_timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Timesteps of a run, descending, [steps]; those of `linspace` are not integers."""
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if schedule.timestep_spacing == "trailing":
        return _trailing(total, total / steps)
    return np.arange(steps)[::-1] * (total // steps) + float(schedule.steps_offset)


def exponential_timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Integer timesteps, descending, [steps], spaced with one more below them that is left out."""
    sigmas = training_sigmas(schedule)
    total = int(np.sum(-np.log(sigmas) >= schedule.lambda_min_clipped))
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[:0:-1]
    if schedule.timestep_spacing == "trailing":
        return _trailing(total, len(sigmas) / steps)
    return np.arange(steps, 0, -1) * (total // (steps + 1)) + float(schedule.steps_offset)


def _trailing(total: int, stride: float) -> np.ndarray:
    return np.arange(total, 0, -stride).round() - 1


def timesteps_to_sigmas(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    sigmas = training_sigmas(schedule)
    return np.interp(timesteps, np.arange(len(sigmas)), sigmas)


def sigmas_to_timesteps(schedule: NoiseSchedule, sigmas: np.ndarray) -> np.ndarray:
    """Timesteps of sigmas, linear in log sigma between those of the training steps."""
    training = training_sigmas(schedule)
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(training), np.arange(len(training)))


def final_sigma(schedule: NoiseSchedule) -> float:
    return 0.0 if schedule.final_sigmas_type == "zero" else float(training_sigmas(schedule)[0])


def respaced_sigmas(
    schedule: NoiseSchedule, high: float, low: float, steps: int
) -> np.ndarray | None:
    """Karras, exponential or beta sigmas between two, descending, [steps]; None if no option asks
    for them.
    """
    high = schedule.sigma_max if schedule.sigma_max is not None else high
    low = schedule.sigma_min if schedule.sigma_min is not None else low
    if schedule.use_karras_sigmas:
        return karras_sigmas(high, low, steps)
    if schedule.use_exponential_sigmas or schedule.use_lu_lambdas:
        return exponential_sigmas(high, low, steps)
    return beta_sigmas(high, low, steps) if schedule.use_beta_sigmas else None
