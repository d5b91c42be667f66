"""The rungs of a run: at which timesteps the model is asked, and at which noise levels.

Spacings: Lin et al. 2023 (arXiv:2305.08891), table 2. Levels: Karras et al. 2022
(arXiv:2206.00364), eq. 5, and others named below.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from sdrt.errors import UsageError

from .noise_schedule import NoiseSchedule, all_levels, highest_level_in_float32
from .sigmas import SIGMA_SCHEDULES, beta, exponential, karras


@dataclass(frozen=True, slots=True)
class TimestepGrid:
    """
    timesteps: N, falling, one per step
    levels: N + 1 noise levels; level[i] is step i's, the last the result's. Empty for solvers
        that go by timesteps alone
    total: steps of the whole run, of which the first `skipped` are left out
    even: whether the timesteps keep one stride; not where the caller chose them
    """

    timesteps: tuple[float, ...]
    levels: tuple[float, ...]
    total: int
    skipped: int = 0
    even: bool = True

    def after(self, count: int) -> "TimestepGrid":
        """The ladder without its first `count` steps."""
        return replace(
            self,
            timesteps=self.timesteps[count:],
            levels=self.levels[count:],
            skipped=self.skipped + count,
        )


def whole(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """Whole timesteps, no levels."""
    return TimestepGrid(tuple(spaced(schedule, steps).round().tolist()), (), steps)


def distilled(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """Every few of the timesteps that a consistency model was distilled on
    (Luo et al. 2023, arXiv:2310.04378, section 4.3).
    """
    count = schedule.original_inference_steps
    if steps > count:
        raise UsageError(
            f"{steps} steps, but original_inference_steps={count}, of which they are a choice"
        )
    stride = schedule.num_train_timesteps // count
    trained = np.arange(count, 0, -1) * stride - 1
    chosen = np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)
    return TimestepGrid(tuple(trained[chosen].astype(float).tolist()), (), steps)


def exploding(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """Levels for the solvers whose latents grow with the noise: from the spacing's first
    timestep's to its last's, then zero.
    """
    timesteps = spaced(schedule, steps)
    levels = levels_at(schedule, timesteps)
    if schedule.interpolation_type == "log_linear":
        low, high = np.log(all_levels(schedule)[[0, -1]]).tolist()
        levels = np.exp(np.linspace(high, low, steps + 1))
    redone = relaid(schedule, float(levels[0]), float(levels[-1]), steps)
    if redone is not None:
        levels, timesteps = redone, timesteps_at(schedule, redone)
    if len(levels) == steps:
        levels = np.append(levels, final_level(schedule))
    if schedule.timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        timesteps = 0.25 * np.log(levels[:-1])
    return TimestepGrid(tuple(timesteps.tolist()), tuple(levels.tolist()), steps)


def rounded_exploding(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """The same, with whole timesteps beside Karras's levels."""
    ladder = exploding(schedule, steps)
    if schedule.use_karras_sigmas:
        return replace(ladder, timesteps=tuple(np.round(ladder.timesteps).tolist()))
    return ladder


def before_end(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """Levels for the solvers in log signal-to-noise ratio: one more timestep is laid out and the
    lowest left to the final level; other levels span the whole schedule.
    """
    timesteps = spaced_before_end(schedule, steps)
    levels = levels_at(schedule, timesteps)
    every = all_levels(schedule)
    redone = relaid(schedule, float(every[-1]), float(every[0]), steps)
    if redone is not None:
        levels, timesteps = redone, timesteps_at(schedule, redone)
        laid = schedule.use_karras_sigmas or schedule.use_lu_lambdas
        timesteps = timesteps.round() if laid else cut(schedule, timesteps)
    levels = np.append(levels, final_level(schedule))
    return TimestepGrid(tuple(timesteps.tolist()), tuple(levels.tolist()), steps)


def cosine_before_end(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """The same, but the cosine schedule's timesteps are cut where others are rounded."""
    ladder = before_end(schedule, steps)
    laid = schedule.use_karras_sigmas or schedule.use_lu_lambdas
    if schedule.beta_schedule == "squaredcos_cap_v2" and laid:
        timesteps = cut(schedule, timesteps_at(schedule, np.array(ladder.levels[:-1])))
        return replace(ladder, timesteps=tuple(timesteps.tolist()))
    return ladder


def cut(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    """Whole timesteps, cut off. The reference library keeps its levels in float32; where that
    rounds the logarithm of the highest up, the highest level lies a hair below its own timestep,
    and the model is fed the one before.
    """
    whole = np.trunc(timesteps)
    if timesteps[0] == schedule.num_train_timesteps - 1:
        highest = highest_level_in_float32(schedule)
        whole[0] -= math.log(float(highest)) < float(np.log(highest))
    return whole


def linspace_before_end(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """The same, always spaced evenly."""
    return before_end(replace(schedule, timestep_spacing="linspace"), steps)


def to_the_lowest(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """The same, ending at the lowest level that is trained; other levels end where they are."""
    ladder = before_end(replace(schedule, final_sigmas_type="sigma_min"), steps)
    if relaid(schedule, 1.0, 0.5, 1) is None:
        return ladder
    return replace(ladder, levels=(*ladder.levels[:-1], ladder.levels[-2]))


def scheduled(schedule: NoiseSchedule, steps: int) -> TimestepGrid:
    """The levels of `sigma_schedule`, which need not be as many as the steps asked for."""
    levels = SIGMA_SCHEDULES[schedule.sigma_schedule](all_levels(schedule), steps)
    timesteps = timesteps_at(schedule, levels[:-1])
    return TimestepGrid(
        tuple(timesteps.tolist()), tuple(levels.tolist()), len(timesteps), even=False
    )


def given(
    schedule: NoiseSchedule, timesteps: tuple[float, ...] | None, sigmas: tuple[float, ...] | None
) -> TimestepGrid:
    """A ladder of the caller's own: falling timesteps, or falling noise levels with the last."""
    values = np.array(timesteps if sigmas is None else sigmas, np.float64)
    most = schedule.num_train_timesteps - 1 if sigmas is None else np.inf
    falling = values.ndim == 1 and (np.diff(values) < 0).all()
    if not falling or len(values) < (1 if sigmas is None else 2) or values[-1] < 0:
        raise UsageError(f"{values.tolist()}: timesteps and sigmas must fall and end at 0 or above")
    if values[0] > most:
        raise UsageError(f"timestep {values[0]:g}; the model was trained on 0 to {most}")
    if sigmas is None:
        levels = np.append(levels_at(schedule, values), final_level(schedule))
    else:
        levels, values = values, timesteps_at(schedule, values[:-1])
    return TimestepGrid(tuple(values.tolist()), tuple(levels.tolist()), len(values), even=False)


def spaced(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Timesteps of a run, falling, [steps]; `linspace` ones are not whole."""
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if schedule.timestep_spacing == "trailing":
        return _trailing(total, total / steps)
    return np.arange(steps)[::-1] * (total // steps) + float(schedule.steps_offset)


def spaced_before_end(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Whole timesteps with one more laid out below, falling, [steps]."""
    levels = all_levels(schedule)
    total = int(np.sum(-np.log(levels) >= schedule.lambda_min_clipped))
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[:0:-1]
    if schedule.timestep_spacing == "trailing":
        return _trailing(total, len(levels) / steps)
    return np.arange(steps, 0, -1) * (total // (steps + 1)) + float(schedule.steps_offset)


def _trailing(total: int, stride: float) -> np.ndarray:
    return np.arange(total, 0, -stride).round() - 1


def levels_at(schedule: NoiseSchedule, timesteps: np.ndarray) -> np.ndarray:
    levels = all_levels(schedule)
    return np.interp(timesteps, np.arange(len(levels)), levels)


def timesteps_at(schedule: NoiseSchedule, levels: np.ndarray) -> np.ndarray:
    """Timesteps of noise levels, between the trained ones linear in the level's logarithm."""
    every = all_levels(schedule)
    return np.interp(np.log(np.maximum(levels, 1e-10)), np.log(every), np.arange(len(every)))


def final_level(schedule: NoiseSchedule) -> float:
    return 0.0 if schedule.final_sigmas_type == "zero" else float(all_levels(schedule)[0])


def relaid(schedule: NoiseSchedule, high: float, low: float, steps: int) -> np.ndarray | None:
    """Levels of another law between two, falling, [steps]; None where the spacing's own stand."""
    high = schedule.sigma_max if schedule.sigma_max is not None else high
    low = schedule.sigma_min if schedule.sigma_min is not None else low
    if schedule.use_karras_sigmas:
        return karras(high, low, steps)
    if schedule.use_exponential_sigmas or schedule.use_lu_lambdas:
        return exponential(high, low, steps)
    return beta(high, low, steps) if schedule.use_beta_sigmas else None
