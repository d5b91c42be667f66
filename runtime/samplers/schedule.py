"""The noise schedule of a `scheduler_config.json`: what every solver reads its numbers from.

Knows configuration keys and arithmetic; no solver. A noisy latent is `alpha * clean + sigma *
noise` with `alpha**2 + sigma**2 = 1`; where a paper scales by `1 / alpha` instead, its sigma is
`sigma / alpha` here.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sdrt.errors import UsageError

log = logging.getLogger(__name__)
IGNORED = {"_class_name", "_diffusers_version", "clip_sample_range", "sample_max_value"}
IGNORED |= {"dynamic_thresholding_ratio", "variance_type"}
# Keys of options that this version does not carry, with the values that leave them off.
OFF: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "lambda_min_clipped": (-math.inf,),
}
NOT_LINEAR = {
    "clip_sample": "clipping the predicted sample",
    "thresholding": "dynamic thresholding",
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """The keys that change numbers, under their published names."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    skip_prk_steps: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: str = "zero"

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """[num_train_timesteps] float64: the share of the clean picture's variance at each step."""
        return np.cumprod(1.0 - betas(self))


def schedule_from_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Schedule:
    """Read a configuration; what is not linear or not carried is refused by name.

    `defaults` are those of the scheduler's class. A key that nothing reads is reported.
    """
    merged = {**defaults, **config}
    for key, what in NOT_LINEAR.items():
        if merged.get(key):
            raise UsageError(
                f"scheduler option {key}=true is refused: {what} is not linear in the model's "
                f"outputs, so it is no row of a table; set {key} to false"
            )
    for key, off in OFF.items():
        if merged.get(key, off[0]) not in off:
            raise UsageError(
                f"scheduler option {key}={merged[key]!r} is not supported; expected {off[0]!r}"
            )
    known = {field.name for field in fields(Schedule)}
    unread = set(merged) - known - IGNORED - set(OFF) - set(NOT_LINEAR)
    if unread:
        log.warning("scheduler options that nothing reads: %s", ", ".join(sorted(unread)))
    schedule = Schedule(**{key: value for key, value in merged.items() if key in known})
    _check(schedule)
    return schedule


def _check(schedule: Schedule) -> None:
    allowed = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    for key, values in allowed.items():
        if (found := getattr(schedule, key)) not in values:
            raise UsageError(f"scheduler option {key}={found!r}; expected {', '.join(values)}")


def betas(schedule: Schedule) -> np.ndarray:
    """Variance added at each training step, [num_train_timesteps] float64."""
    low, high, count = schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps
    if schedule.beta_schedule == "linear":
        return np.linspace(low, high, count)
    if schedule.beta_schedule == "scaled_linear":
        return np.linspace(math.sqrt(low), math.sqrt(high), count) ** 2
    # Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 17
    share = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    capped: np.ndarray = np.minimum(1.0 - share[1:] / share[:-1], 0.999)
    return capped
