"""Sigma schedules that A1111 and ComfyUI offer independently of the sampler.

- Each is a function of `sigmas`, those of all training steps, ascending, [T], and of `n` steps. It
  spans all of them, whatever timestep spacing a model was published with.
- It returns descending sigmas; the last entry is the sigma of the result.

Knows the sigmas of the training steps; no solver and no configuration.
"""

import math
from collections.abc import Callable

import numpy as np

KARRAS_RHO, BETA = 7.0, 0.6
# Sigmas of eleven steps, interpolated for other numbers; from the authors' page.
ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
ALIGN_YOUR_STEPS_XL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def sigma_at(sigmas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Sigmas of timesteps, linear in log sigma between those of the training steps."""
    return np.exp(np.interp(timesteps, np.arange(len(sigmas)), np.log(sigmas)))


def karras_sigmas(high: float, low: float, n: int) -> np.ndarray:
    """Karras et al. 2022 (arXiv:2206.00364), eq. 5, without the last zero."""
    bounds = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    respaced: np.ndarray = (
        bounds[0] + np.linspace(0, 1, n) * (bounds[1] - bounds[0])
    ) ** KARRAS_RHO
    return respaced


def exponential_sigmas(high: float, low: float, n: int) -> np.ndarray:
    """Evenly spaced in log sigma, without the last zero."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def beta_sigmas(high: float, low: float, n: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6): Lee et al. 2024 (arXiv:2407.12173), section 4, without the last
    zero.
    """
    respaced: np.ndarray = low + beta_ppf(1 - np.linspace(0, 1, n), BETA) * (high - low)
    return respaced


def _full_range(spacing: Callable[[float, float, int], np.ndarray]) -> "SigmaSchedule":
    def sigma_schedule(sigmas: np.ndarray, n: int) -> np.ndarray:
        return np.append(spacing(float(sigmas[-1]), float(sigmas[0]), n), 0.0)

    return sigma_schedule


def uniform_sigmas(sigmas: np.ndarray, n: int) -> np.ndarray:
    """Evenly spaced timesteps, from the last to the first."""
    return np.append(sigma_at(sigmas, np.linspace(len(sigmas) - 1, 0, n)), 0.0)


def sgm_uniform_sigmas(sigmas: np.ndarray, n: int) -> np.ndarray:
    """Evenly spaced timesteps without the first, as in Stability's generative-models."""
    return np.append(sigma_at(sigmas, np.linspace(len(sigmas) - 1, 0, n + 1)[:-1]), 0.0)


def simple_sigmas(sigmas: np.ndarray, n: int) -> np.ndarray:
    """Integer timesteps at a constant stride down from the last."""
    stride = len(sigmas) / n
    return np.append(sigmas[[-(1 + int(i * stride)) for i in range(n)]], 0.0)


def ddim_sigmas(sigmas: np.ndarray, n: int) -> np.ndarray:
    """Integer timesteps at a constant integer stride up from the second; a few more than n if n
    does not divide the number of training steps.
    """
    return np.append(sigmas[1 :: max(len(sigmas) // n, 1)][::-1], 0.0)


def kl_optimal_sigmas(sigmas: np.ndarray, n: int) -> np.ndarray:
    """Evenly spaced in arctan(sigma): Sabour et al. 2024 (arXiv:2404.14507), theorem 3.1. Ends at
    the lowest training sigma, not at zero.
    """
    low, high = math.atan(sigmas[0]), math.atan(sigmas[-1])
    fraction = np.arange(n + 1) / n
    return np.tan(fraction * low + (1.0 - fraction) * high)


def _align_your_steps(published: tuple[float, ...]) -> "SigmaSchedule":
    def align_your_steps(sigmas: np.ndarray, n: int) -> np.ndarray:
        """Sabour et al. 2024 (arXiv:2404.14507): published sigmas, log-linear in between."""
        positions = np.linspace(0, 1, len(published))
        logs = np.interp(np.linspace(0, 1, n), positions, np.log(published))
        return np.append(np.exp(logs), 0.0)

    return align_your_steps


SigmaSchedule = Callable[[np.ndarray, int], np.ndarray]
# By A1111's internal names; SDXL has its own sigmas for Align Your Steps.
SIGMA_SCHEDULES: dict[str, SigmaSchedule] = {
    "uniform": uniform_sigmas,
    "karras": _full_range(karras_sigmas),
    "exponential": _full_range(exponential_sigmas),
    "polyexponential": _full_range(exponential_sigmas),  # with its default rho of 1
    "sgm_uniform": sgm_uniform_sigmas,
    "kl_optimal": kl_optimal_sigmas,
    "align_your_steps": _align_your_steps(ALIGN_YOUR_STEPS),
    "align_your_steps_xl": _align_your_steps(ALIGN_YOUR_STEPS_XL),
    "simple": simple_sigmas,
    "normal": uniform_sigmas,
    "ddim": ddim_sigmas,
    "beta": _full_range(beta_sigmas),
}


def beta_ppf(probabilities: np.ndarray, a: float) -> np.ndarray:
    """Quantiles of the symmetric Beta(a, a) distribution, by bisection."""
    low, high = np.zeros_like(probabilities), np.full_like(probabilities, 0.5)
    lower = np.minimum(probabilities, 1 - probabilities)
    for _ in range(60):
        middle = (low + high) / 2
        below = _beta_cdf(middle, a) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(probabilities <= 0.5, high, 1 - high) * (lower > 0) + (probabilities == 1)


def _beta_cdf(x: np.ndarray, a: float) -> np.ndarray:
    """The regularised incomplete beta function I_x(a, a) for x <= 1/2, by its power series
    (Abramowitz and Stegun 26.5.4 in the form x**a / (a B) * 2F1(a, 1 - a; a + 1; x)).
    """
    term, total = np.ones_like(x), np.zeros_like(x)
    for n in range(60):
        total += term / (a + n)
        term = term * x * (n + 1 - a) / (n + 1)
    cdf: np.ndarray = x**a * total * math.gamma(2 * a) / math.gamma(a) ** 2
    return cdf
