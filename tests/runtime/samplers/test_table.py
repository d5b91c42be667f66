"""Sampler tables against diffusers' schedulers, matrix against matrix."""

import contextlib
import itertools

import diffusers
import numpy as np
import pytest
import torch
from reference_schedulers import reference_from_image, reference_table
from sampler_grid import BASE, STEPS, cases

from sdrt.errors import UsageError
from sdrt.runtime.noise import CpuNoise
from sdrt.runtime.samplers import exponential, spacing
from sdrt.runtime.samplers import table as tables
from sdrt.runtime.samplers.noise_schedule import NoiseSchedule
from sdrt.runtime.samplers.registry import SAMPLERS, config_from_name
from sdrt.runtime.samplers.sigmas import beta_ppf
from sdrt.runtime.samplers.table import sample, sampler_table

diffusers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
# Its ancestral DPM2 takes differences of near numbers, so float64 too leaves less of them.
LIMITS = {"KDPM2AncestralDiscreteScheduler": 1e-8}


def third_order_sde(config):
    """The reference's weight of the second derivative has the wrong sign in its last term; see
    `test_third_order_sde_integrates_quadratics`.
    """
    if config.get("algorithm_type") != "sde-dpmsolver++" or config.get("solver_order") != 3:
        return False
    return "Multistep" in config["_class_name"] or config["solver_type"] == "heun"


def reference_differs(config, steps):
    """What the reference gets wrong, or cannot do at every number of steps."""
    ends_where_it_begins = (  # its last sigma repeats the only one
        config["_class_name"] == "UniPCMultistepScheduler"
        and config.get("use_karras_sigmas")
        and config.get("final_sigmas_type") == "sigma_min"
        and steps == 1
    )
    no_such_order = config.get("algorithm_type") == "sde-dpmsolver" and config["solver_order"] == 3
    return third_order_sde(config) or ends_where_it_begins or no_such_order


def relative_difference(actual, expected):
    """The largest difference, relative to the largest entry of its row."""
    assert actual.shape == expected.shape
    return (np.abs(actual - expected) / np.abs(expected).max(axis=1, keepdims=True)).max()


def reference(config, steps, double):
    """The reference's matrix and timesteps, or None where it has none."""
    eta = config.get("eta")
    try:
        matrix, timesteps = reference_table(config, steps, double, eta=eta)
    except (ValueError, IndexError, NotImplementedError, UnboundLocalError):
        return None
    return (matrix, timesteps) if np.isfinite(matrix).all() else None


# The reference takes minutes to step all of these.
LONG = ("KDPM2", "LMS")
GRIDS = [
    pytest.param(name, amount, id=f"{name}, {amount}", marks=marks)
    for name in SAMPLERS
    for amount, marks in (
        (0.01 if name.startswith(LONG) else 0.1, []),
        ("each", [pytest.mark.grid] + [pytest.mark.slow] * name.startswith(LONG)),
        ("all", [pytest.mark.slow]),
    )
]


@pytest.mark.parametrize(("name", "amount"), GRIDS)
def test_tables_match_the_reference_in_float64(name, amount, monkeypatch):
    # What its float32 cuts off another test compares.
    monkeypatch.setattr(
        spacing, "truncate_timesteps", lambda schedule, timesteps: np.trunc(timesteps)
    )
    tables._cached_table.cache_clear()
    compared, asked = 0, 0
    for config, steps in cases(name, amount):
        case = (config, steps)
        expected = reference(config, steps, double=True)
        if reference_differs(*case):
            continue
        asked += 1
        if expected is None:
            with contextlib.suppress(UsageError):
                assert np.isfinite(sampler_table(config, steps).matrix).all(), case
            continue
        table = sampler_table(config, steps)
        if name in LIMITS:  # its middles' timesteps are differences of near numbers too
            assert np.abs(table.timesteps - expected[1]).max() <= 1e-4, case
        else:
            assert np.array_equal(np.float32(table.timesteps), np.float32(expected[1])), case
        assert relative_difference(table.matrix, expected[0]) <= LIMITS.get(name, 1e-10), case
        compared += 1
    tables._cached_table.cache_clear()
    assert compared >= 0.9 * asked


BETAS = ("scaled_linear", "linear")
EXPONENTIAL = sorted(name for name, sampler in SAMPLERS.items() if sampler.family is exponential)


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_integer_timesteps_match_the_reference_in_float32(name):
    """With Karras, exponential and beta sigmas float32 decides which integer timestep the
    model gets. The cosine schedule is left out: its last sigmas are too close for float32.
    """
    options = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    spans = ((0.00085, 0.012), (0.0001, 0.02), (0.0015, 0.0195))
    for option, betas, (low, high) in itertools.product(options, BETAS, spans):
        config = {**BASE, "_class_name": name, option: True, "beta_schedule": betas}
        config |= {"beta_start": low, "beta_end": high}
        scheduler = getattr(diffusers, name).from_config(config)
        for steps in (1, 3, 8, 20):
            scheduler.set_timesteps(steps)
            actual = sampler_table(config, steps).timesteps
            assert actual.tolist() == scheduler.timesteps.tolist(), (config, steps)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.grid] * n.startswith("KDPM2")) for n in SAMPLERS]
)
def test_tables_match_the_reference_within_float32(name):
    """Its schedule is kept in float32; DPM2 a takes differences of near numbers in it."""
    if name == "DPMSolverSDEScheduler":
        pytest.skip("its noise follows a path between sigmas, which its float32 blurs")
    limit = 1e-3 if name == "KDPM2AncestralDiscreteScheduler" else 2e-5
    for timestep_spacing in ("leading", "linspace", "trailing"):
        config = {**BASE, "_class_name": name, "timestep_spacing": timestep_spacing}
        for steps in STEPS:
            matrix, timesteps = reference(config, steps, double=False)
            table = sampler_table(config, steps)
            assert np.abs(table.timesteps - timesteps).max() < 0.02
            assert relative_difference(table.matrix, matrix) <= limit, (timestep_spacing, steps)


@pytest.mark.parametrize("kind", ["Multistep", "Singlestep"])
def test_third_order_sde_differs_from_the_reference_by_one_sign(kind, monkeypatch):
    config = {**BASE, "_class_name": f"DPMSolver{kind}Scheduler", "solver_type": "heun"}
    config |= {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    expected, _ = reference(config, 20, double=True)
    assert relative_difference(sampler_table(config, 20).matrix, expected) > 1e-2
    right = exponential.ExponentialStep.phi_3.fget
    monkeypatch.setattr(
        exponential.ExponentialStep, "phi_3", property(lambda step: right(step) - 1.0)
    )
    tables._cached_table.cache_clear()
    assert relative_difference(sampler_table(config, 20).matrix, expected) <= 1e-11
    tables._cached_table.cache_clear()


def test_third_order_sde_integrates_quadratics():
    """Ours is right: the weights are the integrals of 1, s and s**2 / 2 over the step."""
    schedule = NoiseSchedule(algorithm_type="sde-dpmsolver++")
    for sigma, sigma_next in ((3.0, 2.0), (0.5, 0.1)):
        step = exponential.exponential_step(schedule, sigma, sigma_next)
        h = np.log(sigma / sigma_next)
        nodes, weights = np.polynomial.legendre.leggauss(40)
        fraction = 0.5 * (nodes + 1.0)
        kernel = 2.0 * h * np.exp(-2.0 * h * (1.0 - fraction)) * 0.5 * weights
        expected = [kernel.sum(), (kernel * fraction).sum(), (kernel * fraction**2 / 2.0).sum()]
        np.testing.assert_allclose([step.phi_1, step.phi_2, step.phi_3], expected, rtol=1e-12)


def test_bh1_reaches_a_sigma_of_zero_unlike_the_reference():
    """It multiplies infinity by nothing; ours leaves the empty term out."""
    config = {**BASE, "_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}
    assert reference(config, 10, double=True) is None
    assert np.isfinite(sampler_table(config, 10).matrix).all()


# The sums that diffusers' own scheduler tests publish: ten steps of a dummy model
# from a dummy sample, without clipping.
FULL_LOOPS = {
    ("PNDMScheduler", "plain"): 198.1318,
    ("PNDMScheduler", "set_alpha_to_one"): 230.0399,
    ("EulerDiscreteScheduler", "plain"): 10.0807,
    ("EulerDiscreteScheduler", "use_karras_sigmas"): 124.5230,
    ("EulerAncestralDiscreteScheduler", "plain"): 152.3192,
    ("HeunDiscreteScheduler", "plain"): 0.1233,
    ("LMSDiscreteScheduler", "plain"): 1006.388,
    ("LMSDiscreteScheduler", "use_karras_sigmas"): 3812.9927,
}


@pytest.mark.parametrize(("name", "option"), FULL_LOOPS, ids=lambda value: value)
def test_published_full_loops(name, option):
    config = {"_class_name": name, "beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}
    if name != "PNDMScheduler":
        config["num_train_timesteps"] = 1100
    if option == "set_alpha_to_one":
        config["beta_start"] = 0.01
    if option != "plain":
        config[option] = True
    values = np.arange(4 * 3 * 8 * 8, dtype=np.float64) / (4 * 3 * 8 * 8)
    init = values.reshape(3, 8, 8, 4).transpose(3, 0, 1, 2)
    result = published_loop(config, init)
    # Their float32 timesteps near zero, which the dummy model divides by, move the sums.
    assert np.abs(result).sum() == pytest.approx(FULL_LOOPS[name, option], rel=2e-3)


def published_loop(config, init):
    """Ten steps of `x * t / (t + 1)`. Those tests go on from the scaled model input, as no pipeline
    does; that is an edit of the latents after every evaluation.
    """
    table, noise_source = sampler_table(config, 10, edits=True), CpuNoise(0)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(10)
    count = table.evaluations
    scales = np.ones(count + 1)
    if hasattr(scheduler, "sigmas"):
        scales = 1.0 / np.sqrt(np.asarray(scheduler.sigmas, np.float64) ** 2 + 1.0)
    history = np.zeros((table.matrix.shape[1], init.size))
    history[0] = scales[0] * init.reshape(-1)
    for i in range(table.num_noises):
        history[1 + count + i] = noise_source.randn(init.shape).reshape(-1)
    for k, timestep in enumerate(table.timesteps):
        fed = table.matrix[k] @ history / scales[k]
        history[1 + k] = fed * timestep / (timestep + 1)
        scaled = table.matrix[k + 1] @ history
        if k + 1 < count:
            history[1 + count + table.num_noises + k] = scaled - scaled / scales[k + 1]
    return scaled


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_depend_on_earlier_outputs_only(name):
    table = sampler_table({**BASE, "_class_name": name}, 9)
    outputs = table.matrix[:-1, 1 : 1 + table.evaluations]
    assert not np.triu(outputs).any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_recurrence_expands_to_the_matrix(name):
    for prediction in ("epsilon", "v_prediction"):
        config = {**BASE, "_class_name": name, "solver_order": 3, "prediction_type": prediction}
        table = sampler_table(config, 40)
        assert (table.recurrence[1:] != 0).sum(axis=1).max() <= 8
        count, rows = table.evaluations, np.zeros_like(table.matrix)
        for k, row in enumerate(table.recurrence):
            rows[k] = row[:-count] + row[-count:] @ rows[1:]
        np.testing.assert_allclose(rows, table.matrix, atol=1e-11)


@pytest.mark.parametrize("name", SAMPLERS)
def test_edit_columns_act_like_changed_latents(name):
    """A solver stepped by hand, its latents changed on the way, and the table's edit columns."""
    config = {**BASE, "_class_name": name}
    table, plain = sampler_table(config, 6, edits=True), sampler_table(config, 6)
    count, columns = table.evaluations, plain.matrix.shape[1]
    rng = np.random.default_rng(0)
    values, edits = rng.normal(size=columns), rng.normal(size=count)
    rows = np.zeros(count + 1)
    for k, row in enumerate(plain.recurrence):
        rows[k] = row[:-count] @ values + row[-count:] @ rows[1:]
        rows[k] += edits[k - 1] / plain.scales[k] if k else 0.0
    np.testing.assert_allclose(table.matrix @ np.concatenate([values, edits]), rows, atol=1e-9)
    np.testing.assert_allclose(table.matrix[:, :columns], plain.matrix, atol=1e-11)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"PNDMScheduler"}))
def test_image_to_image_tables_match_the_reference(name):
    """Its image-to-image: noise added for the step begun at, then the rest of the steps."""
    if name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):
        pytest.skip("LMS: the reference weighs slopes it has not seen; SDE: its path's ends move")
    config = {**BASE, "_class_name": name}
    for skipped in (1, 3, 5):
        expected = reference_from_image(config, 8, skipped)
        table = sampler_table(config, 8, denoise_from=skipped)
        assert relative_difference(table.matrix, expected) <= 1e-9, skipped


ADDS_NOISE = {name for name, sampler in SAMPLERS.items() if sampler.adds_noise}


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - ADDS_NOISE))
def test_a_perfect_model_returns_the_image(name):
    table = sampler_table({**BASE, "_class_name": name}, 8, denoise_from=3)
    image, noise = table.matrix[-1, -1], table.matrix[-1, :-1].sum()
    assert np.hypot(image, noise) == pytest.approx(1.0, abs=1e-9) and abs(noise) < 0.05


@pytest.mark.parametrize("name", ["PNDMScheduler", "LMSDiscreteScheduler"])
def test_a_perfect_model_does_not_return_the_image_in_the_reference(name):
    """PNDM counts its repeated first timestep among those left out, LMS weighs slopes that it has
    not seen; so the tests above leave them out.
    """
    expected = reference_from_image({**BASE, "_class_name": name}, 8, 3)
    image, noise = expected[-1, -1], expected[-1, :-1].sum()
    assert abs(np.hypot(image, noise) - 1.0) > 1e-3


def test_custom_timesteps_and_sigmas():
    config = {**BASE, "_class_name": "DPMSolverMultistepScheduler"}
    grid = [999, 800, 500, 300, 120, 40]
    expected, timesteps = reference_table(config, None, double=True, timesteps=grid)
    table = sampler_table(config, 6, timesteps=grid)
    assert table.timesteps.tolist() == timesteps.tolist() == grid
    assert relative_difference(table.matrix, expected) <= 1e-11
    euler = {**BASE, "_class_name": "EulerDiscreteScheduler"}
    assert sampler_table(euler, 1, sigmas=[14.0, 3.0, 0.5, 0.0]).evaluations == 3


def test_beta_ppf_matches_scipy():
    scipy = pytest.importorskip("scipy.stats")
    fractions = np.linspace(0, 1, 101)
    np.testing.assert_allclose(
        beta_ppf(fractions, 0.6), scipy.beta.ppf(fractions, 0.6, 0.6), atol=1e-12
    )


def test_guidance_splits_each_output_into_two_columns():
    table = sampler_table({**BASE, "_class_name": "DDIMScheduler"}, 3)
    rng = np.random.default_rng(0)
    unguided, guided = rng.normal(size=(2, 3))
    both_rows = table.with_guidance(7.5) @ np.concatenate(
        [[1.0], np.stack([unguided, guided], 1).ravel()]
    )
    mixed = table.matrix @ np.concatenate([[1.0], unguided + 7.5 * (guided - unguided)])
    np.testing.assert_allclose(both_rows, mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EulerDiscrete"}, "did you mean EulerDiscreteScheduler"),
        ({"_class_name": "MagicScheduler"}, "sdrt schedulers"),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, "not linear"),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "not linear"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "odd"}, "scaled_linear"),
        ({"_class_name": "EulerDiscreteScheduler", "use_flow_sigmas": True}, "flow matching"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 4}, "solver_order"),
        ({"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 10**9}, "from 1 to"),
        ({"_class_name": "DDIMScheduler", "beta_start": "low"}, "beta_start is 'low'"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]}, "has 2 numbers"),
        (
            {"_class_name": "DDPMScheduler", "beta_start": 0.0, "beta_end": 0.0}
            | {"clip_sample": False},
            "cannot be computed",
        ),
        (
            {"_class_name": "DEISMultistepScheduler", "sigma_min": 0.0, "use_karras_sigmas": True},
            "cannot be computed",
        ),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 5}, "original_inference"),
        ({"_class_name": "PNDMScheduler", "num_train_timesteps": 1}, "1 to 1"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
            | {"use_beta_sigmas": True},
            "only one",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "final_sigmas_type to sigma_min",
        ),
        (
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
            | {"clip_sample": False, "timestep_spacing": "trailing"},
            "to v_prediction",
        ),
    ],
)
def test_unsupported_configurations_are_refused_by_name(config, message):
    with pytest.raises(UsageError, match=message):
        sampler_table(config, 10)


CLIPPING = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", CLIPPING)
def test_clipping_matches_the_reference(name, prediction):
    """Images of pixels: the clean one that an evaluation predicts is kept within bounds."""
    config = {**BASE, "_class_name": name, "prediction_type": prediction}
    config |= {"clip_sample": True, "clip_sample_range": 0.8}
    eta = {"eta": 0.5} if name == "DDIMScheduler" else {}
    reference = getattr(diffusers, name).from_config(config)
    reference.set_timesteps(7)
    rng = np.random.default_rng(0)
    init, weights = rng.normal(size=(2, 1, 3, 8, 8)).astype(np.float32)

    def model(x, timestep):
        return np.tanh(0.7 * x + weights * timestep / 1000)

    table = sampler_table({**config, **eta}, 7)
    stream = torch.Generator().manual_seed(1)
    x = torch.from_numpy(init)
    for t in reference.timesteps:
        output = torch.from_numpy(model(x.numpy(), float(t)))
        x = reference.step(output, t, x, generator=stream, **eta).prev_sample
    noise_source = CpuNoise(1)
    noise = [noise_source.randn(init.shape) for _ in range(table.num_noises)]
    actual = sample(table, model, init, noise)
    assert np.abs(actual - x.numpy()).max() <= 2e-5 * np.abs(x.numpy()).max()
    plain = sample(sampler_table({**config, **eta, "clip_sample": False}, 7), model, init, noise)
    assert np.abs(actual - plain).max() > 0.05


def test_a_named_sampler_keeps_clip_sample():
    for name, clip, expected in (
        ("DDPMScheduler", {}, True),  # its class's default
        ("DDPMScheduler", {"clip_sample": False}, False),
        ("PNDMScheduler", {}, False),
    ):
        config = {**BASE, "_class_name": name}
        del config["clip_sample"]
        assert config_from_name("DDIM", config | clip)["clip_sample"] is expected
        assert config_from_name("Euler", config | clip)["clip_sample"] is False


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(UsageError, match="from 1 to 1000"):
        sampler_table({**BASE, "_class_name": "DDIMScheduler"}, steps)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"timesteps": [10, 20]}, "descending"),
        ({"timesteps": [1000, 20]}, "expected 0 to 999"),
        ({"timesteps": []}, "descending"),
        ({"sigmas": [1.0]}, "descending"),
        ({"timesteps": [20, 10], "sigmas": [2.0, 1.0]}, "one of them"),
        ({"denoise_from": 10}, "expected 0 to 9"),
    ],
)
def test_custom_timesteps_and_sigmas_are_checked(grid, message):
    with pytest.raises(UsageError, match=message):
        sampler_table({**BASE, "_class_name": "EulerDiscreteScheduler"}, 10, **grid)


def test_a_wrong_number_of_noises_is_refused():
    table = sampler_table({**BASE, "_class_name": "EulerAncestralDiscreteScheduler"}, 3)
    with pytest.raises(UsageError, match="expected 3 and 0"):
        sample(table, lambda x, t: x, np.zeros((1, 4, 4, 4), np.float32))


def test_ignored_options_are_logged(caplog):
    config = {**BASE, "_class_name": "EulerAncestralDiscreteScheduler", "use_karras_sigmas": True}
    sampler_table({**config, "mystery": 1}, 2)
    assert "mystery" in caplog.text and "use_karras_sigmas" in caplog.text
