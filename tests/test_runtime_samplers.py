"""Tables against the reference library's schedulers, stepped with basis vectors in float64."""

import numpy as np
import pytest
from sdrt.runtime.samplers.table import SAMPLERS, sampler_table

from sdrt.errors import UsageError

BASE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def reference_table(config, steps):
    """The matrix and timesteps of the reference scheduler, by feeding it unit vectors."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    columns = 1 + len(scheduler.timesteps)
    basis = torch.eye(columns, dtype=torch.float64)
    x, rows = basis[0] * scheduler.init_noise_sigma, []
    for k, timestep in enumerate(scheduler.timesteps):
        rows.append(scheduler.scale_model_input(x, timestep).numpy().copy())
        x = scheduler.step(basis[1 + k], timestep, x).prev_sample
    return np.array([*rows, x.numpy()]), scheduler.timesteps.numpy()


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.reference
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", None])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_table_is_the_reference(name, prediction, spacing):
    pytest.importorskip("diffusers")
    if name == "PNDMScheduler" and prediction == "sample":
        pytest.skip("the reference's PNDM has no sample prediction")
    config = {**BASE, "_class_name": name, "prediction_type": prediction}
    if spacing:
        config["timestep_spacing"] = spacing
    for steps in (1, 2, 3, 4, 10, 20, 50):
        matrix, timesteps = reference_table(config, steps)
        table = sampler_table(config, steps)
        # The reference keeps its schedule in float32, which is where the difference comes from.
        assert np.abs(table.timesteps - timesteps).max() < 1e-3
        assert np.abs(table.matrix - matrix).max() <= 2e-5 * np.abs(matrix).max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_read_only_what_is_known(name):
    table = sampler_table({**BASE, "_class_name": name}, 9)
    outputs = table.matrix[:, 1:]
    assert not np.triu(outputs[:-1]).any()


def test_guidance_is_two_columns():
    table = sampler_table({**BASE, "_class_name": "DDIMScheduler"}, 3)
    rng = np.random.default_rng(0)
    unguided, guided = rng.normal(size=(2, 3))
    both = table.guided(7.5) @ np.concatenate([[1.0], np.stack([unguided, guided], 1).ravel()])
    mixed = table.matrix @ np.concatenate([[1.0], unguided + 7.5 * (guided - unguided)])
    np.testing.assert_allclose(both, mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "MagicScheduler"}, "one of: DDIMScheduler"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "not linear"),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "not linear"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "odd"}, "scaled_linear"),
    ],
)
def test_what_cannot_be_a_table_is_refused_by_name(config, message):
    with pytest.raises(UsageError, match=message):
        sampler_table(config, 10)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_steps_out_of_range(steps):
    with pytest.raises(UsageError, match="from 1 to 1000"):
        sampler_table({**BASE, "_class_name": "DDIMScheduler"}, steps)


def test_unread_keys_are_reported(caplog):
    sampler_table({**BASE, "_class_name": "EulerDiscreteScheduler", "mystery": 1}, 2)
    assert "mystery" in caplog.text
