"""Schedules of noise levels by A1111's names, and the samplers that are read with them."""

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
    pair_from_name,
    takes_schedule,
    title_of,
    titles,
)
from sdrt.runtime.samplers.table import sample, sampler_table

# As models are published: spaced by leading timesteps, which no schedule of levels may follow.
BASE = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
BY_LEVELS = ("Euler", "Euler a", "LMS", "Heun", "DPM2", "DPM2 a", "DPM++ SDE", "DPM++ 2S a")
BY_LEVELS += ("DPM++ 2M", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE")


def trained():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    return ((1 - kept) / kept) ** 0.5


def wanted_levels(label, n, xl=False):
    """The published formula of each schedule, in torch and scipy."""
    sigmas = trained()
    low, high = sigmas[0].item(), sigmas[-1].item()

    def level(t):
        below = int(min(math.floor(t), 998))
        share = t - below
        return math.exp((1 - share) * sigmas[below].log() + share * sigmas[below + 1].log())

    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    if label in ("Uniform", "Normal"):
        return [level(t) for t in torch.linspace(999, 0, n).tolist()] + [0.0]
    if label == "SGM Uniform":
        return [level(t) for t in torch.linspace(999, 0, n + 1)[:-1].tolist()] + [0.0]
    if label == "Karras":
        laid = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        return [*laid.tolist(), 0.0]
    if label in ("Exponential", "Polyexponential"):
        laid = torch.exp(torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64))
        return [*laid.tolist(), 0.0]
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
    middle = (6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113)
    if not xl:
        middle = (6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152)
    rising = np.log([14.615, *middle, 0.029][::-1])
    laid = np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, 11), rising))[::-1]
    return [*laid.tolist(), 0.0]


def levels_of(name, n, xl=False):
    """What a sampler's table is made of: the ratio of noise to picture before each evaluation."""
    shares = sampler_table(config_from_name(name, BASE, xl=xl), n).shares
    return shares[:-1, 1] / shares[:-1, 0]


@pytest.mark.parametrize("n", [1, 8, 11, 20, 30])
@pytest.mark.parametrize("label", SCHEDULES)
def test_levels_are_the_published_formulas(label, n):
    if label == "Align Your Steps" and n == 1:
        n = 2  # its formula gives the lowest level for one step, from which nothing can be made
    for title in ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE"):
        wanted = wanted_levels(label, n)[:-1]
        found = levels_of(f"{title} {label}", n)
        # The torch ramps of the schedules by timestep are float32, as their users' are.
        assert found == pytest.approx(wanted, rel=2e-6), title


def test_xl_has_aligned_steps_of_its_own():
    wanted = wanted_levels("Align Your Steps", 14, xl=True)[:-1]
    assert levels_of("Euler Align Your Steps", 14, xl=True) == pytest.approx(wanted)
    config = config_from_name("Euler Align Your Steps", BASE, xl=True)
    assert title_of(config) == "Euler Align Your Steps"


def test_every_pair_has_one_name():
    for title in titles():
        for label in SCHEDULES:
            name = f"{title} {label}"
            if takes_schedule(title, label):
                config = config_from_name(name.upper(), BASE)
                assert title_of(config) == name
                assert np.isfinite(sampler_table(config, 7).matrix).all()
                assert pair_from_name(name) == (title, label)
            else:
                with pytest.raises(UsageError):
                    config_from_name(name, BASE)
    assert all(takes_schedule(title, label) for title in BY_LEVELS for label in SCHEDULES)
    assert not any(takes_schedule(t, "Karras") for t in ("DDIM", "DDPM", "PLMS", "LCM", "TCD"))


def test_a_schedule_ends_with_the_name_that_asked_for_it():
    for title in ("DDIM", "UniPC", "DPM++ 2M"):
        plain = config_from_name(title, BASE)
        again = config_from_name(title, config_from_name("Euler a SGM Uniform", BASE))
        assert np.array_equal(sampler_table(plain, 6).matrix, sampler_table(again, 6).matrix)


def down_up(level, after, eta):
    up = min(after, eta * (after**2 * (level**2 - after**2) / level**2) ** 0.5)
    return (after**2 - up**2) ** 0.5, up


def denoised(x, level):
    """A model that is no linear one, in the form clean = f(x, level)."""
    return np.tanh(x / math.hypot(level, 1.0)) * 0.7


def stepped_2s(levels, x, noises, eta):
    for i, (level, after) in enumerate(itertools.pairwise(levels)):
        clean = denoised(x, level)
        down, up = down_up(level, after, eta)
        if down == 0:
            return clean
        h = math.log(level / down)
        middle = math.exp(-(-math.log(level) + h / 2))
        other = denoised((middle / level) * x - math.expm1(-h / 2) * clean, middle)
        x = (down / level) * x - math.expm1(-h) * other + up * noises[i]
    return x


def stepped_euler(levels, x, noises, eta):
    for i, (level, after) in enumerate(itertools.pairwise(levels)):
        down, up = down_up(level, after, eta)
        x = x + (x - denoised(x, level)) / level * (down - level)
        x = x + up * noises[i] if after else x
    return x


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("name", "stepped"), [("DPM++ 2S a", stepped_2s), ("Euler a", stepped_euler)]
)
def test_ancestral_samplers_are_the_textbooks(name, stepped, eta):
    rng, levels = np.random.default_rng(0), wanted_levels("Karras", 9)
    table = sampler_table({**config_from_name(f"{name} Karras", BASE), "eta": eta}, 9)
    start, noises = rng.standard_normal(16), rng.standard_normal((table.noises, 16))
    by_time = {
        float(t): s[1] / s[0] for t, s in zip(table.timesteps, table.shares[:-1], strict=True)
    }

    def predicted(x, timestep):  # the noise in the model's own input
        level = by_time[timestep]
        grown = x * math.hypot(level, 1.0)
        return (grown - denoised(grown, level)) / level

    found = sample(table, predicted, start, noises)
    assert found == pytest.approx(stepped(levels, start * levels[0], noises, eta), abs=2e-5)
