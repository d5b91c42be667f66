"""The noise schedule of a `scheduler_config.json`: betas, alphas and sigmas of the training steps.

- Variance preserving: `x = alpha * denoised + sigma * noise` with `alpha**2 + sigma**2 = 1`.
- In the form of Karras et al. x is divided by alpha, and its sigma is `sigma / alpha`. That is the
  sigma of `training_sigmas` and `sigma_to_alpha_sigma`.

Knows configuration keys and arithmetic; no solver.
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
# Keys that do not change any number here, and those that only matter to what is refused below.
IGNORED = {"sample_max_value"}  # and all names that begin with an underscore
IGNORED |= {"dynamic_thresholding_ratio", "flow_shift", "time_shift_type", "noise_sampler_seed"}
REFUSED = {
    "thresholding": "dynamic thresholding is not linear in the model outputs",
    "use_flow_sigmas": "flow matching models are unsupported",
    "use_dynamic_shifting": "flow matching models are unsupported",
    "shift_terminal": "flow matching models are unsupported",
    "solver_p": "predictors of another class are unsupported",
}
SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# Keys that only some solvers read, with the value that has no effect.
SOLVER_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(SIGMA_OPTIONS, False),
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "lambda_min_clipped": -math.inf,
    "euler_at_final": False,
    "eta": 0.0,
    "sigma_schedule": "",
}
# The values allowed; beyond them memory is unbounded, or a sigma has no logarithm.
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
    **dict.fromkeys(SIGMA_OPTIONS, boolean),
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
    """The keys that change numbers, under their names in diffusers.

    `eta`, an argument of a call there, is a key here; `sigma_schedule` is a key of
    `sigmas.SIGMA_SCHEDULES`.
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
    config: Mapping[str, Any], defaults: Mapping[str, Any], options: Set[str]
) -> NoiseSchedule:
    """Parse a scheduler configuration. Keys that nothing reads are logged.

    Args:
        config: The contents of a `scheduler_config.json`.
        defaults: Those of the scheduler's class.
        options: The keys of `SOLVER_OPTIONS` that the scheduler reads.

    Raises:
        UsageError: An option that cannot be a table of numbers, or a value out of range.
    """
    merged = {**defaults, **{k: v for k, v in config.items() if v is not None}}
    for key, reason in REFUSED.items():
        if merged.get(key):
            raise UsageError(f"unsupported scheduler option {key}={merged[key]!r}: {reason}")
    if merged.get("clip_sample") and "clip_sample" not in options:
        raise UsageError(
            "unsupported scheduler option clip_sample=True: clipping is not linear in the model "
            "outputs, and only DDIM, DDPM and LCM have a step of their own for it"
        )
    ignored = {key for key in merged if not is_scheduler_option(key)}
    ignored |= {
        k
        for k in SOLVER_OPTIONS.keys() - options
        if merged.pop(k, SOLVER_OPTIONS[k]) != SOLVER_OPTIONS[k]
    }
    if ignored:
        _warn(tuple(sorted(ignored)))
    try:
        values = {key: READERS[key](merged[key], key) for key in merged.keys() & FIELDS}
    except ValueError as error:
        raise UsageError(f"scheduler option {error}") from error
    schedule = NoiseSchedule(**values)
    _check(schedule)
    return schedule


FIELDS = {field.name for field in fields(NoiseSchedule)}


def is_scheduler_option(key: str) -> bool:
    """Whether any scheduler reads a key of a configuration."""
    return key in FIELDS | IGNORED | REFUSED.keys() or key[:1] == "_"


@lru_cache(maxsize=64)
def _warn(ignored: tuple[str, ...]) -> None:
    """Once: tables of many lengths are built of one configuration."""
    log.warning("ignored scheduler options: %s", ", ".join(ignored))


def _check(schedule: NoiseSchedule) -> None:
    """Raise UsageError for keys that contradict each other."""
    if sum(bool(getattr(schedule, key)) for key in SIGMA_OPTIONS) > 1:
        raise UsageError(f"only one of {', '.join(SIGMA_OPTIONS)} can be true")
    count, trained = schedule.num_train_timesteps, schedule.trained_betas
    if trained is not None and len(trained) != count:
        raise UsageError(
            f"scheduler option trained_betas has {len(trained)} numbers; expected {count}"
        )


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
    alpha_bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    capped: np.ndarray = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return capped


@lru_cache(maxsize=32)
def alphas_cumprod(schedule: NoiseSchedule) -> np.ndarray:
    """The square of alpha at each training step, [num_train_timesteps] float64."""
    cumulative = np.cumprod(1.0 - betas(schedule))
    if schedule.rescale_betas_zero_snr:  # Lin et al. 2023 (arXiv:2305.08891), algorithm 1
        root = np.sqrt(cumulative)
        cumulative = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    cumulative.setflags(write=False)
    return cumulative


@lru_cache(maxsize=32)
def training_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """`sigma / alpha` of all training steps, ascending, [num_train_timesteps] float64."""
    cumulative = alphas_cumprod(schedule)
    if schedule.rescale_betas_zero_snr:  # sigmas must be finite; diffusers' floor
        cumulative = np.maximum(cumulative, 2.0**-24)
    sigmas = np.sqrt((1.0 - cumulative) / cumulative)
    sigmas.setflags(write=False)
    return sigmas


def max_sigma_float32(schedule: NoiseSchedule) -> np.float32:
    """The highest sigma as diffusers computes it in float32, to the last bit."""
    one, low, high = np.float32(1.0), schedule.beta_start, schedule.beta_end
    count = schedule.num_train_timesteps
    if schedule.trained_betas is not None or schedule.beta_schedule == "squaredcos_cap_v2":
        steps = betas(schedule).astype(np.float32)
    elif schedule.beta_schedule == "linear":
        steps = _linspace_float32(low, high, count)
    else:
        steps = _linspace_float32(math.sqrt(low), math.sqrt(high), count) ** 2
    alpha_prod = np.float32(np.cumprod((one - steps).astype(np.float64))[-1])
    if schedule.rescale_betas_zero_snr:
        alpha_prod = np.float32(2.0**-24)
    return np.sqrt((one - alpha_prod) / alpha_prod)


def _linspace_float32(low: float, high: float, count: int) -> np.ndarray:
    """As torch computes it: from the start up to the middle, from the end down to it, the step in
    float32 and each product and sum rounded once.
    """
    first, last = np.float32(low), np.float32(high)
    step, index = float((last - first) / np.float32(count - 1)), np.arange(count)
    up, down = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, up, down).astype(np.float32)


def alpha_sigma(schedule: NoiseSchedule, timestep: float) -> tuple[float, float]:
    """alpha and sigma at a timestep; a negative one is the end of the run."""
    cumulative = alphas_cumprod(schedule)
    if timestep >= 0:
        alpha_prod = float(cumulative[int(timestep)])
    else:
        alpha_prod = 1.0 if schedule.set_alpha_to_one else float(cumulative[0])
    return math.sqrt(alpha_prod), math.sqrt(1.0 - alpha_prod)


def sigma_to_alpha_sigma(sigma: float) -> tuple[float, float]:
    """The variance-preserving alpha and sigma of a sigma in the form of Karras et al."""
    alpha = 1.0 / math.hypot(sigma, 1.0)
    return alpha, sigma * alpha


def denoised_and_noise(
    schedule: NoiseSchedule, x: Any, output: Any, alpha: float, sigma: float
) -> tuple[Any, Any]:
    """The denoised latent and the noise in x, from a model output of any prediction type.

    `v_prediction`: Salimans and Ho 2022 (arXiv:2202.00512), appendix D.
    """
    if schedule.prediction_type == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    if schedule.prediction_type == "sample":
        return output, (1.0 / sigma) * (x - alpha * output)
    if alpha == 0.0:
        raise UsageError(
            "prediction_type epsilon is undefined for pure noise, at which rescale_betas_zero_snr "
            "starts",
            hint="set prediction_type to v_prediction or rescale_betas_zero_snr to false",
        )
    return (1.0 / alpha) * (x - sigma * output), output
