"""Parts of runs by `denoising_start` and `denoising_end`, against diffusers' pipelines."""

import importlib

import numpy as np
import pytest
import torch
from reference_schedulers import _step_all, in_float64

from sdrt.errors import UsageError
from sdrt.runtime.samplers.registry import SAMPLERS
from sdrt.runtime.samplers.table import sample, sampler_table

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
BASE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
STEPS = 10
# Their image to image differs from diffusers' on purpose: see `test_table.py`.
OWN_STARTS = {"PNDMScheduler", "LMSDiscreteScheduler", "DPMSolverSDEScheduler"}


def reference_part(name, start=None, end=None):
    """The matrix of a part of diffusers' run in float64. Its pipelines choose the timesteps, by
    their own methods; the last column is the image's latents.
    """
    kind = getattr(diffusers, name)
    module = importlib.import_module(kind.__module__)
    with in_float64(module):
        scheduler = kind.from_config({"_class_name": name, **BASE})
        scheduler.set_timesteps(STEPS)
        timesteps = scheduler.timesteps
        if start is not None:
            pipe = diffusers.StableDiffusionXLImg2ImgPipeline.__new__(
                diffusers.StableDiffusionXLImg2ImgPipeline
            )
            object.__setattr__(pipe, "scheduler", scheduler)
            timesteps, _ = pipe.get_timesteps(STEPS, 0.3, None, denoising_start=start)
        if end is not None:  # as its `__call__`
            cutoff = round(1000 - end * 1000)
            timesteps = timesteps[: sum(int(t >= cutoff) for t in timesteps)]
        basis = torch.eye(2 + 3 * len(timesteps), dtype=torch.float64)[:, None]
        x = basis[0] * scheduler.init_noise_sigma if start is None else basis[-1]
        matrix, numbers = _step_all(scheduler, module, None, timesteps, basis, x)
    return (matrix if start is not None else matrix[:, :-1]), numbers


def pad(matrix, columns):
    """With the fresh noises that diffusers samples and does not use, zeros."""
    return np.pad(matrix, ((0, 0), (0, columns - matrix.shape[1])))


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"DPMSolverSDEScheduler"}))
@pytest.mark.parametrize("end", [0.8, 0.43, 0.15])
def test_the_part_before_an_end_is_that_of_diffusers(name, end):
    expected, timesteps = reference_part(name, end=end)
    table = sampler_table({"_class_name": name, **BASE}, STEPS, denoising_end=end)
    assert table.timesteps == pytest.approx(timesteps, rel=1e-6)
    actual = pad(table.matrix, expected.shape[1])
    assert np.abs(actual - expected).max() <= 1e-9 * np.abs(expected).max()
    assert table.alphas_sigmas.shape == (table.evaluations + 1, 2)


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - OWN_STARTS))
@pytest.mark.parametrize("part", [(0.8, None), (0.43, None), (0.06, 0.5), (0.43, 0.8)])
def test_the_part_from_a_start_is_that_of_diffusers(name, part):
    start, end = part
    expected, timesteps = reference_part(name, start, end)
    table = sampler_table(
        {"_class_name": name, **BASE}, STEPS, denoising_start=start, denoising_end=end
    )
    assert table.timesteps == pytest.approx(timesteps, rel=1e-6)
    assert table.starts_from_image
    noises = expected.shape[1] - 2 - table.evaluations  # diffusers samples for each step
    columns = [*range(1 + table.evaluations + table.num_noises), -1]
    unused = expected[:, 1 + table.evaluations + table.num_noises : -1]
    assert noises >= table.num_noises and not unused.any()
    difference = table.matrix - expected[:, columns]
    assert np.abs(difference).max() <= 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler", "LCMScheduler"])
@pytest.mark.parametrize("switch", [0.2, 0.8])
def test_both_parts_of_a_sampler_without_memory_are_the_full_run(name, switch):
    config = {"_class_name": name, **BASE}
    first = sampler_table(config, STEPS, denoising_end=switch)
    second = sampler_table(config, STEPS, denoising_start=switch)
    full = sampler_table(config, STEPS)
    assert [*first.timesteps, *second.timesteps] == full.timesteps.tolist()
    rng = np.random.default_rng(0)
    start, *noise = rng.normal(size=(1 + full.num_noises, 4)).astype(np.float32)

    def model(x, timestep):
        return np.float32(0.3) * x + np.float32(timestep / 1000)

    handed = sample(first, model, start, noise[: first.num_noises])
    rest = noise[first.num_noises :]
    result = sample(second, model, np.zeros_like(start), rest, handed)
    np.testing.assert_allclose(result, sample(full, model, start, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_clipping_stays_with_its_evaluations(name):
    config = {**BASE, "_class_name": name, "clip_sample": True}
    full = sampler_table(config, STEPS)
    table = sampler_table(config, STEPS, denoising_end=0.5)
    assert table.clip is not None and full.clip is not None
    assert table.clip.denoised.tolist() == full.clip.denoised[: table.evaluations].tolist()
    assert len(table.clip.weights) == table.evaluations < full.evaluations


def test_an_edit_of_the_last_latents_is_one_of_the_result():
    config = {"_class_name": "EulerDiscreteScheduler", **BASE}
    table = sampler_table(config, STEPS, denoising_end=0.5, edits=True)
    assert table.matrix[-1, -1] == pytest.approx(1.0)
    assert table.matrix.shape[1] == 1 + 2 * table.evaluations


@pytest.mark.parametrize(
    "part", [{"denoising_start": 0.999}, {"denoising_end": 0.001}], ids=["start", "end"]
)
def test_a_part_without_a_step_is_refused(part):
    config = {"_class_name": "EulerDiscreteScheduler", **BASE}
    with pytest.raises(UsageError, match="leaves no step") as caught:
        sampler_table(config, 2, **part)
    assert "num_inference_steps" in str(caught.value.hint)
