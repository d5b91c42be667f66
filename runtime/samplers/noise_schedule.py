"""The noise schedule of a `scheduler_config.json`: what every solver reads its numbers from.

Knows configuration keys and arithmetic; no solver. A noisy latent is `alpha * clean + sigma *
noise` with `alpha**2 + sigma**2 = 1`. Where a paper divides by `alpha` instead, the noise level is
`level = sigma / alpha`.
"""

import logging
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from sdrt.errors import UsageError
from sdrt.json_validation import Reader, array, boolean, integer, number, one_of

from .sigmas import SIGMA_SCHEDULES

log = logging.getLogger(__name__)
# Keys without a bearing on numbers here, and those that only matter to what is refused below.
IGNORED = {"sample_max_value"}  # and all names that begin with an underscore
IGNORED |= {"dynamic_thresholding_ratio", "flow_shift", "time_shift_type", "noise_sampler_seed"}
REFUSED = {
    "thresholding": "dynamic thresholding is not linear in the model's outputs",
    "use_flow_sigmas": "flow matching is another family of models",
    "use_dynamic_shifting": "flow matching is another family of models",
    "shift_terminal": "flow matching is another family of models",
    "solver_p": "a predictor of another class is not carried",
}
LADDERS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# Keys that only some solvers read, with the value that changes nothing.
FOREIGN: dict[str, Any] = {
    **dict.fromkeys(LADDERS, False),
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "lambda_min_clipped": -math.inf,
    "euler_at_final": False,
    "eta": 0.0,
    "sigma_schedule": "",
}
# What each key may be; beyond it memory has no bound, or a level no logarithm.
STEPS, POSITIVE = integer(1, 100_000), number(0.0, 1e6)
READERS: dict[str, Reader[Any]] = {
    "num_train_timesteps": STEPS,
    "beta_start": number(0.0, 0.999),
    "beta_end": number(0.0, 0.999),
    "beta_schedule": one_of(("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": array(number(0.0, 0.9999), 1, 100_000),
    "rescale_betas_zero_snr": boolean,
    "prediction_type": one_of(("epsilon", "v_prediction", "sample")),
    "timestep_spacing": one_of(("leading", "linspace", "trailing")),
    "timestep_type": one_of(("discrete", "continuous")),
    "steps_offset": integer(0, 100_000),
    "interpolation_type": one_of(("linear", "log_linear")),
    **dict.fromkeys(LADDERS, boolean),
    "sigma_schedule": one_of(("", *SIGMA_SCHEDULES)),
    "sigma_min": POSITIVE,
    "sigma_max": POSITIVE,
    "final_sigmas_type": one_of(("zero", "sigma_min")),
    "lambda_min_clipped": number(),
    "set_alpha_to_one": boolean,
    "skip_prk_steps": boolean,
    "variance_type": one_of(
        ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    ),
    "eta": number(0.0, 1.0),
    "clip_sample": boolean,
    "clip_sample_range": POSITIVE,
    "solver_order": integer(1, 3),
    "algorithm_type": one_of(
        (
            *("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"),
            "ancestral",
        )
    ),
    "solver_type": one_of(("midpoint", "heun", "logrho", "bh1", "bh2")),
    "lower_order_final": boolean,
    "euler_at_final": boolean,
    "predict_x0": boolean,
    "disable_corrector": array(integer(0, 1000), 0, 1000),
    "original_inference_steps": STEPS,
    "timestep_scaling": POSITIVE,
}


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The keys that change numbers, under their published names; `eta` is a call's in the
    reference library and a key here, and `sigma_schedule` is of `sigmas.SIGMA_SCHEDULES`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    timestep_type: str = "discrete"
    steps_offset: int = 0
    interpolation_type: str = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    sigma_schedule: str = ""
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    set_alpha_to_one: bool = False
    skip_prk_steps: bool = False
    variance_type: str | None = None
    eta: float = 0.0
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    solver_order: int = 2
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0


def schedule_from_config(
    config: Mapping[str, Any], defaults: Mapping[str, Any], reads: Set[str]
) -> NoiseSchedule:
    """Read a configuration; what cannot be a table is refused by name.

    defaults: those of the scheduler's class. reads: the keys of `FOREIGN` that it reads.
    A key that nothing reads is reported.
    """
    merged = {**defaults, **{k: v for k, v in config.items() if v is not None}}
    for key, reason in REFUSED.items():
        if merged.get(key):
            raise UsageError(f"scheduler option {key}={merged[key]!r} is refused: {reason}")
    if merged.get("clip_sample") and "clip_sample" not in reads:
        raise UsageError(
            "scheduler option clip_sample=True is refused: clipping is not linear in the model's "
            "outputs, and only DDIM, DDPM and LCM have a step of their own for it"
        )
    known = {field.name for field in fields(NoiseSchedule)}
    unread = {key for key in set(merged) - known - IGNORED - set(REFUSED) if key[:1] != "_"}
    unread |= {k for k in FOREIGN.keys() - reads if merged.pop(k, FOREIGN[k]) != FOREIGN[k]}
    if unread:
        log.warning("scheduler options that nothing reads: %s", ", ".join(sorted(unread)))
    try:
        values = {key: READERS[key](merged[key], key) for key in merged.keys() & known}
    except ValueError as error:
        raise UsageError(f"scheduler option {error}") from error
    schedule = NoiseSchedule(**values)
    _check(schedule)
    return schedule


def _check(schedule: NoiseSchedule) -> None:
    """Raise UsageError for what is wrong between keys."""
    if sum(bool(getattr(schedule, key)) for key in LADDERS) > 1:
        raise UsageError(f"of {', '.join(LADDERS)} only one can be true")
    count, given = schedule.num_train_timesteps, schedule.trained_betas
    if given is not None and len(given) != count:
        raise UsageError(f"scheduler option trained_betas has {len(given)} numbers, not {count}")


def betas(schedule: NoiseSchedule) -> np.ndarray:
    """Variance added at each training step, [num_train_timesteps] float64."""
    low, high, count = schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.array(schedule.trained_betas, np.float64)
    if schedule.beta_schedule == "linear":
        return np.linspace(low, high, count)
    if schedule.beta_schedule == "scaled_linear":
        return np.linspace(math.sqrt(low), math.sqrt(high), count) ** 2
    # Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 17
    share = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    capped: np.ndarray = np.minimum(1.0 - share[1:] / share[:-1], 0.999)
    return capped


@lru_cache(maxsize=32)
def alphas_cumprod(schedule: NoiseSchedule) -> np.ndarray:
    """[num_train_timesteps] float64: the share of the clean picture's variance at each step."""
    cumulative = np.cumprod(1.0 - betas(schedule))
    if schedule.rescale_betas_zero_snr:  # Lin et al. 2023 (arXiv:2305.08891), algorithm 1
        root = np.sqrt(cumulative)
        cumulative = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    cumulative.setflags(write=False)
    return cumulative


@lru_cache(maxsize=32)
def all_levels(schedule: NoiseSchedule) -> np.ndarray:
    """Noise levels of all training steps, rising, [num_train_timesteps] float64."""
    cumulative = alphas_cumprod(schedule)
    if schedule.rescale_betas_zero_snr:  # a level must be finite; the reference library's floor
        cumulative = np.maximum(cumulative, 2.0**-24)
    levels = np.sqrt((1.0 - cumulative) / cumulative)
    levels.setflags(write=False)
    return levels


def highest_level_in_float32(schedule: NoiseSchedule) -> np.float32:
    """The highest noise level as the reference library's float32 has it, to the last bit."""
    one, low, high = np.float32(1.0), schedule.beta_start, schedule.beta_end
    count = schedule.num_train_timesteps
    if schedule.trained_betas is not None or schedule.beta_schedule == "squaredcos_cap_v2":
        steps = betas(schedule).astype(np.float32)
    elif schedule.beta_schedule == "linear":
        steps = _linspace_in_float32(low, high, count)
    else:
        steps = _linspace_in_float32(math.sqrt(low), math.sqrt(high), count) ** 2
    share = np.float32(np.cumprod((one - steps).astype(np.float64))[-1])
    if schedule.rescale_betas_zero_snr:
        share = np.float32(2.0**-24)
    return np.sqrt((one - share) / share)


def _linspace_in_float32(low: float, high: float, count: int) -> np.ndarray:
    """As torch lays it out: from the start up to the middle, from the end down to it, the step in
    float32 and each product and sum rounded once.
    """
    first, last = np.float32(low), np.float32(high)
    step, index = float((last - first) / np.float32(count - 1)), np.arange(count)
    up, down = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, up, down).astype(np.float32)


def alpha_sigma(schedule: NoiseSchedule, timestep: float) -> tuple[float, float]:
    """Shares of clean latent and noise at a timestep; below 0 it is the end of the run."""
    cumulative = alphas_cumprod(schedule)
    if timestep >= 0:
        share = float(cumulative[int(timestep)])
    else:
        share = 1.0 if schedule.set_alpha_to_one else float(cumulative[0])
    return math.sqrt(share), math.sqrt(1.0 - share)


def alpha_sigma_from_level(level: float) -> tuple[float, float]:
    """Shares of clean latent and noise at a noise level."""
    alpha = 1.0 / math.hypot(level, 1.0)
    return alpha, level * alpha


def clean_and_noise(
    schedule: NoiseSchedule, x: Any, output: Any, alpha: float, sigma: float
) -> tuple[Any, Any]:
    """The clean latent and the noise in x that the model's output stands for.

    `v_prediction`: Salimans and Ho 2022 (arXiv:2202.00512), appendix D.
    """
    if schedule.prediction_type == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    if schedule.prediction_type == "sample":
        return output, (1.0 / sigma) * (x - alpha * output)
    if alpha == 0.0:
        raise UsageError(
            "prediction_type epsilon says nothing about a start of pure noise; "
            "rescale_betas_zero_snr needs v_prediction, or leave it off"
        )
    return (1.0 / alpha) * (x - sigma * output), output
