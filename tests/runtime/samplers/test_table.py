"""Sampler tables against the reference library's schedulers, matrix against matrix."""

import contextlib
import itertools

import diffusers
import numpy as np
import pytest
import torch
from reference_schedulers import reference_from_picture, reference_table
from sampler_grid import BASE, STEPS, cases

from sdrt.errors import UsageError
from sdrt.runtime.noise import CpuNoise
from sdrt.runtime.samplers import exponential
from sdrt.runtime.samplers import spacing as samplers_spacing
from sdrt.runtime.samplers import table as table_module
from sdrt.runtime.samplers.noise_schedule import NoiseSchedule
from sdrt.runtime.samplers.registry import SAMPLERS, config_from_name
from sdrt.runtime.samplers.sigmas import beta_quantile
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


def third_order_with_noise(config):
    """The reference's weight of the second derivative has the wrong sign in its last term; see
    `test_third_order_with_noise_integrates_quadratics`.
    """
    if config.get("algorithm_type") != "sde-dpmsolver++" or config.get("solver_order") != 3:
        return False
    return "Multistep" in config["_class_name"] or config["solver_type"] == "heun"


def known_to_differ(config, steps):
    """What the reference gets wrong, or cannot do at every number of steps."""
    ends_where_it_begins = (  # its last level repeats the only one
        config["_class_name"] == "UniPCMultistepScheduler"
        and config.get("use_karras_sigmas")
        and config.get("final_sigmas_type") == "sigma_min"
        and steps == 1
    )
    no_such_order = config.get("algorithm_type") == "sde-dpmsolver" and config["solver_order"] == 3
    return third_order_with_noise(config) or ends_where_it_begins or no_such_order


def difference(found, wanted):
    """The largest difference, relative to the largest entry of its row."""
    assert found.shape == wanted.shape
    return (np.abs(found - wanted) / np.abs(wanted).max(axis=1, keepdims=True)).max()


def both(config, steps, double):
    """The reference's matrix and timesteps, or None where it has none."""
    eta = config.get("eta")
    try:
        matrix, timesteps = reference_table(config, steps, double, eta=eta)
    except (ValueError, IndexError, NotImplementedError, UnboundLocalError):
        return None
    return (matrix, timesteps) if np.isfinite(matrix).all() else None


# The reference takes minutes to step all of these.
LONG = ("KDPM2", "LMS")
SHARES = [(name, 0.01 if name.startswith(LONG) else 0.1) for name in SAMPLERS]
GRIDS = [pytest.param(name, share, id=f"{name}, some") for name, share in SHARES]
GRIDS += [pytest.param(name, 1.0, id=f"{name}, all", marks=pytest.mark.grid) for name in SAMPLERS]


@pytest.mark.parametrize(("name", "share"), GRIDS)
def test_tables_are_the_references_in_float64(name, share, monkeypatch):
    # What its float32 cuts off another test compares.
    monkeypatch.setattr(samplers_spacing, "cut", lambda schedule, timesteps: np.trunc(timesteps))
    table_module._table.cache_clear()
    compared, asked = 0, 0
    for config, steps in cases(name, share):
        case = (config, steps)
        wanted = both(config, steps, double=True)
        if known_to_differ(*case):
            continue
        asked += 1
        if wanted is None:
            with contextlib.suppress(UsageError):
                assert np.isfinite(sampler_table(config, steps).matrix).all(), case
            continue
        table = sampler_table(config, steps)
        if name in LIMITS:  # its middles' timesteps are differences of near numbers too
            assert np.abs(table.timesteps - wanted[1]).max() <= 1e-4, case
        else:
            assert np.array_equal(np.float32(table.timesteps), np.float32(wanted[1])), case
        assert difference(table.matrix, wanted[0]) <= LIMITS.get(name, 1e-10), case
        compared += 1
    table_module._table.cache_clear()
    assert compared >= 0.9 * asked


BETAS = ("scaled_linear", "linear")
LAYING = sorted(name for name, sampler in SAMPLERS.items() if sampler.family is exponential)


@pytest.mark.parametrize("name", LAYING)
def test_whole_timesteps_are_those_of_its_float32(name):
    """Levels of another law: there float32 decides which whole timestep the model is fed. With the
    cosine schedule, whose last levels float32 hardly knows, one may be another inside the run.
    """
    laws = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    spans = ((0.00085, 0.012), (0.0001, 0.02), (0.0015, 0.0195))
    for law, betas, (low, high) in itertools.product(laws, BETAS, spans):
        config = {**BASE, "_class_name": name, law: True, "beta_schedule": betas}
        config |= {"beta_start": low, "beta_end": high}
        scheduler = getattr(diffusers, name).from_config(config)
        for steps in (1, 3, 8, 20):
            scheduler.set_timesteps(steps)
            found = sampler_table(config, steps).timesteps
            assert found.tolist() == scheduler.timesteps.tolist(), (config, steps)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.grid] * n.startswith("KDPM2")) for n in SAMPLERS]
)
def test_tables_are_the_references_to_its_float32(name):
    """Its schedule is kept in float32; DPM2 a takes differences of near numbers in it."""
    if name == "DPMSolverSDEScheduler":
        pytest.skip("its noise follows a path between levels, which its float32 blurs")
    limit = 1e-3 if name == "KDPM2AncestralDiscreteScheduler" else 2e-5
    for spacing in ("leading", "linspace", "trailing"):
        config = {**BASE, "_class_name": name, "timestep_spacing": spacing}
        for steps in STEPS:
            matrix, timesteps = both(config, steps, double=False)
            table = sampler_table(config, steps)
            assert np.abs(table.timesteps - timesteps).max() < 0.02
            assert difference(table.matrix, matrix) <= limit, (spacing, steps)


@pytest.mark.parametrize("kind", ["Multistep", "Singlestep"])
def test_third_order_with_noise_differs_by_one_sign_alone(kind, monkeypatch):
    config = {**BASE, "_class_name": f"DPMSolver{kind}Scheduler", "solver_type": "heun"}
    config |= {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    wanted, _ = both(config, 20, double=True)
    assert difference(sampler_table(config, 20).matrix, wanted) > 1e-2
    right = exponential.Leap.bend.fget
    monkeypatch.setattr(exponential.Leap, "bend", property(lambda leap: right(leap) - 1.0))
    table_module._table.cache_clear()
    assert difference(sampler_table(config, 20).matrix, wanted) <= 1e-11
    table_module._table.cache_clear()


def test_third_order_with_noise_integrates_quadratics():
    """Ours is right: the weights are the integrals of 1, s and s**2 / 2 over the step."""
    schedule = NoiseSchedule(algorithm_type="sde-dpmsolver++")
    for level, after in ((3.0, 2.0), (0.5, 0.1)):
        step = exponential.leap(schedule, level, after)
        h = np.log(level / after)
        nodes, weights = np.polynomial.legendre.leggauss(40)
        share = 0.5 * (nodes + 1.0)
        kernel = 2.0 * h * np.exp(-2.0 * h * (1.0 - share)) * 0.5 * weights
        wanted = [kernel.sum(), (kernel * share).sum(), (kernel * share**2 / 2.0).sum()]
        np.testing.assert_allclose([step.constant, step.slope, step.bend], wanted, rtol=1e-12)


def test_the_reference_has_no_bh1_to_no_noise():
    """It multiplies infinity by nothing; ours leaves the empty term out."""
    config = {**BASE, "_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}
    assert both(config, 10, double=True) is None
    assert np.isfinite(sampler_table(config, 10).matrix).all()


# The sums that the reference library's own scheduler tests publish for a made-up model over ten
# steps from a made-up sample, where nothing is clipped.
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
    # Their float32 timesteps near zero, which the made-up model divides by, move the sums.
    assert np.abs(result).sum() == pytest.approx(FULL_LOOPS[name, option], rel=2e-3)


def published_loop(config, init):
    """Ten steps of `x * t / (t + 1)`. Those tests go on from the scaled model input, as no pipeline
    does; that is an edit of the latents after every evaluation.
    """
    table, drawn = sampler_table(config, 10, edits=True), CpuNoise(0)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(10)
    count = table.evaluations
    scales = np.ones(count + 1)
    if hasattr(scheduler, "sigmas"):
        scales = 1.0 / np.sqrt(np.asarray(scheduler.sigmas, np.float64) ** 2 + 1.0)
    history = np.zeros((table.matrix.shape[1], init.size))
    history[0] = scales[0] * init.reshape(-1)
    for i in range(table.noises):
        history[1 + count + i] = drawn.randn(init.shape).reshape(-1)
    for k, timestep in enumerate(table.timesteps):
        fed = table.matrix[k] @ history / scales[k]
        history[1 + k] = fed * timestep / (timestep + 1)
        scaled = table.matrix[k + 1] @ history
        if k + 1 < count:
            history[1 + count + table.noises + k] = scaled - scaled / scales[k + 1]
    return scaled


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_read_only_what_is_known(name):
    table = sampler_table({**BASE, "_class_name": name}, 9)
    outputs = table.matrix[:-1, 1 : 1 + table.evaluations]
    assert not np.triu(outputs).any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_chain_is_the_matrix_in_short(name):
    for prediction in ("epsilon", "v_prediction"):
        config = {**BASE, "_class_name": name, "solver_order": 3, "prediction_type": prediction}
        table = sampler_table(config, 40)
        assert (table.chain[1:] != 0).sum(axis=1).max() <= 8
        count, rows = table.evaluations, np.zeros_like(table.matrix)
        for k, row in enumerate(table.chain):
            rows[k] = row[:-count] + row[-count:] @ rows[1:]
        np.testing.assert_allclose(rows, table.matrix, atol=1e-11)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_edit_is_what_changing_the_latents_does(name):
    """A solver stepped by hand, its latents changed on the way, and the table's edit columns."""
    config = {**BASE, "_class_name": name}
    table, plain = sampler_table(config, 6, edits=True), sampler_table(config, 6)
    count, columns = table.evaluations, plain.matrix.shape[1]
    rng = np.random.default_rng(0)
    values, edits = rng.normal(size=columns), rng.normal(size=count)
    rows = np.zeros(count + 1)
    for k, row in enumerate(plain.chain):
        rows[k] = row[:-count] @ values + row[-count:] @ rows[1:]
        rows[k] += edits[k - 1] / plain.scales[k] if k else 0.0
    np.testing.assert_allclose(table.matrix @ np.concatenate([values, edits]), rows, atol=1e-9)
    np.testing.assert_allclose(table.matrix[:, :columns], plain.matrix, atol=1e-11)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"PNDMScheduler"}))
def test_a_run_from_a_picture_is_the_references(name):
    """Its image-to-image: noise added for the step begun at, then the rest of the steps."""
    if name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):
        pytest.skip("LMS: the reference weighs slopes it has not seen; SDE: its path's ends move")
    config = {**BASE, "_class_name": name}
    for skipped in (1, 3, 5):
        wanted = reference_from_picture(config, 8, skipped)
        table = sampler_table(config, 8, denoise_from=skipped)
        assert difference(table.matrix, wanted) <= 1e-9, skipped


DRAWING = {name for name, sampler in SAMPLERS.items() if sampler.draws}


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - DRAWING))
def test_a_model_that_knows_the_noise_gives_the_picture_back(name):
    table = sampler_table({**BASE, "_class_name": name}, 8, denoise_from=3)
    picture, noise = table.matrix[-1, -1], table.matrix[-1, :-1].sum()
    assert np.hypot(picture, noise) == pytest.approx(1.0, abs=1e-9) and abs(noise) < 0.05


@pytest.mark.parametrize("name", ["PNDMScheduler", "LMSDiscreteScheduler"])
def test_the_references_runs_from_a_picture_do_not(name):
    """PNDM counts its repeated first timestep among those left out, LMS weighs slopes that it has
    not seen; so the tests above leave them out.
    """
    wanted = reference_from_picture({**BASE, "_class_name": name}, 8, 3)
    picture, noise = wanted[-1, -1], wanted[-1, :-1].sum()
    assert abs(np.hypot(picture, noise) - 1.0) > 1e-3


def test_timesteps_of_ones_own():
    config = {**BASE, "_class_name": "DPMSolverMultistepScheduler"}
    rungs = [999, 800, 500, 300, 120, 40]
    wanted, timesteps = reference_table(config, None, double=True, timesteps=rungs)
    table = sampler_table(config, 6, timesteps=rungs)
    assert table.timesteps.tolist() == timesteps.tolist() == rungs
    assert difference(table.matrix, wanted) <= 1e-11
    euler = {**BASE, "_class_name": "EulerDiscreteScheduler"}
    assert sampler_table(euler, 1, sigmas=[14.0, 3.0, 0.5, 0.0]).evaluations == 3


def test_beta_quantiles_are_scipys():
    scipy = pytest.importorskip("scipy.stats")
    shares = np.linspace(0, 1, 101)
    np.testing.assert_allclose(
        beta_quantile(shares, 0.6), scipy.beta.ppf(shares, 0.6, 0.6), atol=1e-12
    )


def test_guidance_is_two_columns():
    table = sampler_table({**BASE, "_class_name": "DDIMScheduler"}, 3)
    rng = np.random.default_rng(0)
    unguided, guided = rng.normal(size=(2, 3))
    both_rows = table.guided(7.5) @ np.concatenate([[1.0], np.stack([unguided, guided], 1).ravel()])
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
            "cannot be laid out",
        ),
        (
            {"_class_name": "DEISMultistepScheduler", "sigma_min": 0.0, "use_karras_sigmas": True},
            "cannot be laid out",
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
            "needs v_prediction",
        ),
    ],
)
def test_what_cannot_be_a_table_is_refused_by_name(config, message):
    with pytest.raises(UsageError, match=message):
        sampler_table(config, 10)


CLIPPING = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", CLIPPING)
def test_clipping_is_the_references(name, prediction):
    """Pictures of pixels: the clean one that an evaluation foretells is kept within bounds."""
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
    own = CpuNoise(1)
    noise = [own.randn(init.shape) for _ in range(table.noises)]
    found = sample(table, model, init, noise)
    assert np.abs(found - x.numpy()).max() <= 2e-5 * np.abs(x.numpy()).max()
    plain = sample(sampler_table({**config, **eta, "clip_sample": False}, 7), model, init, noise)
    assert np.abs(found - plain).max() > 0.05


def test_a_sampler_by_name_clips_as_the_other_did():
    for name, clip, wanted in (
        ("DDPMScheduler", {}, True),  # its class's default
        ("DDPMScheduler", {"clip_sample": False}, False),
        ("PNDMScheduler", {}, False),
    ):
        config = {**BASE, "_class_name": name}
        del config["clip_sample"]
        assert config_from_name("DDIM", config | clip)["clip_sample"] is wanted
        assert config_from_name("Euler", config | clip)["clip_sample"] is False


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_steps_out_of_range(steps):
    with pytest.raises(UsageError, match="from 1 to 1000"):
        sampler_table({**BASE, "_class_name": "DDIMScheduler"}, steps)


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ({"timesteps": [10, 20]}, "must fall"),
        ({"timesteps": [1000, 20]}, "trained on 0 to 999"),
        ({"timesteps": []}, "must fall"),
        ({"sigmas": [1.0]}, "must fall"),
        ({"timesteps": [20, 10], "sigmas": [2.0, 1.0]}, "one of them"),
        ({"denoise_from": 10}, "fewer than all"),
    ],
)
def test_rungs_of_ones_own_are_checked(rungs, message):
    with pytest.raises(UsageError, match=message):
        sampler_table({**BASE, "_class_name": "EulerDiscreteScheduler"}, 10, **rungs)


def test_noise_of_another_count_is_refused():
    table = sampler_table({**BASE, "_class_name": "EulerAncestralDiscreteScheduler"}, 3)
    with pytest.raises(UsageError, match="the table has 3 and 0"):
        sample(table, lambda x, t: x, np.zeros((1, 4, 4, 4), np.float32))


def test_unread_keys_are_reported(caplog):
    config = {**BASE, "_class_name": "EulerAncestralDiscreteScheduler", "use_karras_sigmas": True}
    sampler_table({**config, "mystery": 1}, 2)
    assert "mystery" in caplog.text and "use_karras_sigmas" in caplog.text
