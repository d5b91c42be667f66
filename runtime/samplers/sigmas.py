"""Noise levels of a run by the schedules that A1111 and ComfyUI offer apart from the sampler.

Knows the levels of the training steps; no solver and no configuration. Each schedule spans all of
them, whatever timestep spacing a model was published with. `levels`: those of all training steps,
rising, [T]; `n`: steps. A result falls, and its last entry is the level at which the run ends.
"""

import math
from collections.abc import Callable

import numpy as np

KARRAS_RHO, BETA = 7.0, 0.6
# Levels of eleven steps, to be interpolated for other numbers; from the authors' page.
ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
ALIGNED_XL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def level_at(levels: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Levels at timesteps, between the trained ones linear in the level's logarithm."""
    return np.exp(np.interp(timesteps, np.arange(len(levels)), np.log(levels)))


def karras(high: float, low: float, n: int) -> np.ndarray:
    """Karras et al. 2022 (arXiv:2206.00364), eq. 5, without the last zero."""
    ends = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    laid: np.ndarray = (ends[0] + np.linspace(0, 1, n) * (ends[1] - ends[0])) ** KARRAS_RHO
    return laid


def exponential(high: float, low: float, n: int) -> np.ndarray:
    """Even in the logarithm, without the last zero."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta(high: float, low: float, n: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6): Lee et al. 2024 (arXiv:2407.12173), section 4, without the last
    zero.
    """
    laid: np.ndarray = low + beta_quantile(1 - np.linspace(0, 1, n), BETA) * (high - low)
    return laid


def _spanning(law: Callable[[float, float, int], np.ndarray]) -> "SigmaSchedule":
    def laid(levels: np.ndarray, n: int) -> np.ndarray:
        return np.append(law(float(levels[-1]), float(levels[0]), n), 0.0)

    return laid


def uniform(levels: np.ndarray, n: int) -> np.ndarray:
    """Even in the timestep, from the last to the first."""
    return np.append(level_at(levels, np.linspace(len(levels) - 1, 0, n)), 0.0)


def sgm_uniform(levels: np.ndarray, n: int) -> np.ndarray:
    """Even in the timestep, the first left to the end: the layout of Stability's own code."""
    return np.append(level_at(levels, np.linspace(len(levels) - 1, 0, n + 1)[:-1]), 0.0)


def simple(levels: np.ndarray, n: int) -> np.ndarray:
    """Whole timesteps at one stride down from the last."""
    stride = len(levels) / n
    return np.append(levels[[-(1 + int(i * stride)) for i in range(n)]], 0.0)


def ddim(levels: np.ndarray, n: int) -> np.ndarray:
    """Whole timesteps at one whole stride up from the second; where the number of steps does not
    divide the training steps, a few more than asked for.
    """
    return np.append(levels[1 :: max(len(levels) // n, 1)][::-1], 0.0)


def kl_optimal(levels: np.ndarray, n: int) -> np.ndarray:
    """Even in the level's arctangent: Sabour et al. 2024 (arXiv:2404.14507), theorem 3.1. It ends
    at the lowest level that is trained, not at zero.
    """
    low, high = math.atan(levels[0]), math.atan(levels[-1])
    share = np.arange(n + 1) / n
    return np.tan(share * low + (1.0 - share) * high)


def _aligned(published: tuple[float, ...]) -> "SigmaSchedule":
    def align_your_steps(levels: np.ndarray, n: int) -> np.ndarray:
        """Sabour et al. 2024 (arXiv:2404.14507): published levels, log-linear between them."""
        places = np.linspace(0, 1, len(published))
        logs = np.interp(np.linspace(0, 1, n), places, np.log(published))
        return np.append(np.exp(logs), 0.0)

    return align_your_steps


SigmaSchedule = Callable[[np.ndarray, int], np.ndarray]
# By A1111's internal names; the second model family has levels of its own.
SIGMA_SCHEDULES: dict[str, SigmaSchedule] = {
    "uniform": uniform,
    "karras": _spanning(karras),
    "exponential": _spanning(exponential),
    "polyexponential": _spanning(exponential),  # with the power that is its default, 1
    "sgm_uniform": sgm_uniform,
    "kl_optimal": kl_optimal,
    "align_your_steps": _aligned(ALIGNED),
    "align_your_steps_xl": _aligned(ALIGNED_XL),
    "simple": simple,
    "normal": uniform,
    "ddim": ddim,
    "beta": _spanning(beta),
}


def beta_quantile(shares: np.ndarray, a: float) -> np.ndarray:
    """Where the symmetric Beta(a, a) distribution has the given shares below, by bisection."""
    low, high = np.zeros_like(shares), np.full_like(shares, 0.5)
    lower = np.minimum(shares, 1 - shares)
    for _ in range(60):
        middle = (low + high) / 2
        below = _beta_share(middle, a) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares <= 0.5, high, 1 - high) * (lower > 0) + (shares == 1)


def _beta_share(x: np.ndarray, a: float) -> np.ndarray:
    """The regularised incomplete beta function I_x(a, a) for x <= 1/2, by its power series
    (Abramowitz and Stegun 26.5.4 in the form x**a / (a B) * 2F1(a, 1 - a; a + 1; x)).
    """
    term, total = np.ones_like(x), np.zeros_like(x)
    for n in range(60):
        total += term / (a + n)
        term = term * x * (n + 1 - a) / (n + 1)
    share: np.ndarray = x**a * total * math.gamma(2 * a) / math.gamma(a) ** 2
    return share
