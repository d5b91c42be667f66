"""Schedules of noise sigmas by A1111's names, and the samplers that are read with them."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from sdrt.errors import UsageError
from sdrt.runtime.samplers.registry import (
    SCHEDULES,
    config_from_name,
    parse_sampler_name,
    sampler_title,
    supports_schedule,
    titles,
)
from sdrt.runtime.samplers.table import sample, sampler_table

# As models are published: spaced by leading timesteps, which no schedule of sigmas may follow.
BASE = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
WITH_SCHEDULES = ("Euler", "Euler a", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ SDE", "DPM++ 2S a")
WITH_SCHEDULES += ("DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE")


def training_sigmas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    cumprod = torch.cumprod(1 - betas, 0)
    return ((1 - cumprod) / cumprod) ** 0.5


def expected_sigmas(label, n, xl=False):
    """The published formula of each schedule, in torch and scipy."""
    sigmas = training_sigmas()
    low, high = sigmas[0].item(), sigmas[-1].item()

    def sigma(t):
        below = int(min(math.floor(t), 998))
        fraction = t - below
        return math.exp((1 - fraction) * sigmas[below].log() + fraction * sigmas[below + 1].log())

    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    if label in ("Uniform", "Normal"):
        return [sigma(t) for t in torch.linspace(999, 0, n).tolist()] + [0.0]
    if label == "SGM Uniform":
        return [sigma(t) for t in torch.linspace(999, 0, n + 1)[:-1].tolist()] + [0.0]
    if label == "Karras":
        spaced = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        return [*spaced.tolist(), 0.0]
    if label in ("Exponential", "Polyexponential"):
        spaced = torch.exp(torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64))
        return [*spaced.tolist(), 0.0]
    if label == "KL Optimal":
        low, high = math.atan(low), math.atan(high)
        return [math.tan(i / n * low + (1 - i / n) * high) for i in range(n + 1)]
    if label == "Simple":
        return [sigmas[-(1 + int(i * 1000 / n))].item() for i in range(n)] + [0.0]
    if label == "DDIM":
        return [sigmas[i].item() for i in range(1, 1000, max(1000 // n, 1))][::-1] + [0.0]
    if label == "Beta":
        return [low + stats.beta.ppf(1 - r, 0.6, 0.6) * (high - low) for r in ramp.tolist()] + [0.0]
    assert label == "Align Your Steps"
    sigma_mid = (6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113)
    if not xl:
        sigma_mid = (6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152)
    rising = np.log([14.615, *sigma_mid, 0.029][::-1])
    spaced = np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, 11), rising))[::-1]
    return [*spaced.tolist(), 0.0]


def sampled_sigmas(name, n, xl=False):
    """What a sampler's table is made of: the ratio of noise to image before each evaluation."""
    alphas_sigmas = sampler_table(config_from_name(name, BASE, xl=xl), n).alphas_sigmas
    return alphas_sigmas[:-1, 1] / alphas_sigmas[:-1, 0]


@pytest.mark.parametrize("n", [1, 8, 11, 20, 30])
@pytest.mark.parametrize("label", SCHEDULES)
def test_sigma_schedules_match_the_published_formulas(label, n):
    if label == "Align Your Steps" and n == 1:
        n = 2  # its formula gives the lowest sigma for one step, from which nothing can be made
    for title in ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE"):
        expected = expected_sigmas(label, n)[:-1]
        actual = sampled_sigmas(f"{title} {label}", n)
        # The torch ramps of the schedules by timestep are float32, as their users' are.
        assert actual == pytest.approx(expected, rel=2e-6), title


def test_sdxl_has_its_own_align_your_steps():
    expected = expected_sigmas("Align Your Steps", 14, xl=True)[:-1]
    assert sampled_sigmas("Euler Align Your Steps", 14, xl=True) == pytest.approx(expected)
    config = config_from_name("Euler Align Your Steps", BASE, xl=True)
    assert sampler_title(config) == "Euler Align Your Steps"


def test_every_sampler_and_schedule_round_trips_through_its_name():
    for title in titles():
        for label in SCHEDULES:
            name = f"{title} {label}"
            if supports_schedule(title, label):
                config = config_from_name(name.upper(), BASE)
                assert sampler_title(config) == name
                assert np.isfinite(sampler_table(config, 7).matrix).all()
                assert parse_sampler_name(name) == (title, label)
            else:
                with pytest.raises(UsageError):
                    config_from_name(name, BASE)
    assert all(supports_schedule(title, label) for title in WITH_SCHEDULES for label in SCHEDULES)
    assert not any(supports_schedule(t, "Karras") for t in ("DDIM", "DDPM", "PLMS", "LCM", "TCD"))


def test_another_sampler_does_not_inherit_the_sigma_schedule():
    for title in ("DDIM", "UniPC", "DPM++ 2M"):
        plain = config_from_name(title, BASE)
        again = config_from_name(title, config_from_name("Euler a SGM Uniform", BASE))
        assert np.array_equal(sampler_table(plain, 6).matrix, sampler_table(again, 6).matrix)


def ancestral_step(sigma, sigma_next, eta):
    sigma_up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - sigma_up**2) ** 0.5, sigma_up


def denoise(x, sigma):
    """A model that is no linear one, in the form denoised = f(x, sigma)."""
    return np.tanh(x / math.hypot(sigma, 1.0)) * 0.7


def dpmpp_2s_by_hand(sigmas, x, noises, eta):
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(x, sigma)
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        if sigma_down == 0:
            return denoised
        h = math.log(sigma / sigma_down)
        sigma_mid = math.exp(-(-math.log(sigma) + h / 2))
        other = denoise((sigma_mid / sigma) * x - math.expm1(-h / 2) * denoised, sigma_mid)
        x = (sigma_down / sigma) * x - math.expm1(-h) * other + sigma_up * noises[i]
    return x


def euler_by_hand(sigmas, x, noises, eta):
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        sigma_down, sigma_up = ancestral_step(sigma, sigma_next, eta)
        x = x + (x - denoise(x, sigma)) / sigma * (sigma_down - sigma)
        x = x + sigma_up * noises[i] if sigma_next else x
    return x


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("name", "by_hand"), [("DPM++ 2S a", dpmpp_2s_by_hand), ("Euler a", euler_by_hand)]
)
def test_ancestral_samplers_match_a_textbook_implementation(name, by_hand, eta):
    rng, sigmas = np.random.default_rng(0), expected_sigmas("Karras", 9)
    table = sampler_table({**config_from_name(f"{name} Karras", BASE), "eta": eta}, 9)
    start, noises = rng.standard_normal(16), rng.standard_normal((table.num_noises, 16))
    sigma_at = {
        float(t): s[1] / s[0]
        for t, s in zip(table.timesteps, table.alphas_sigmas[:-1], strict=True)
    }

    def epsilon(x, timestep):  # the noise in the model's own input
        sigma = sigma_at[timestep]
        grown = x * math.hypot(sigma, 1.0)
        return (grown - denoise(grown, sigma)) / sigma

    actual = sample(table, epsilon, start, noises)
    assert actual == pytest.approx(by_hand(sigmas, start * sigmas[0], noises, eta), abs=2e-5)
