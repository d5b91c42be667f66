"""Conditioning by evaluation and guidance of several prompts, with a model made of numbers."""

from dataclasses import replace

import numpy as np
import pytest

from sdrt.runtime.conditioning_schedule import ConditioningSchedule, build_constant_schedule
from sdrt.runtime.denoising import BatchBuilder, DenoisingState, Guidance, get_history_layout
from sdrt.runtime.samplers.registry import config_from_name
from sdrt.runtime.samplers.table import sample, sampler_table
from sdrt.runtime.sampling_program import build_sampling_program

SHAPE = (4, 3, 5)


class Engine:
    """A model that reads one number of context; it records what every call was fed."""

    def __init__(self):
        self.contexts = []

    def __call__(self, feeds):
        self.contexts.append(feeds["context"][:, 0, 0].tolist())
        return {"output": predict(feeds["sample"], feeds["context"][:, 0, 0])}


def predict(latents, context):
    return np.tanh(0.3 * latents + np.asarray(context, np.float32).reshape(-1, 1, 1, 1))


def schedule_of(contexts, num_negative, selections):
    values = np.array(contexts, np.float32).reshape(-1, 1, 1)
    return ConditioningSchedule({"context": values}, num_negative, selections)


def start(table, guidance, conditioning, seed=0):
    rng = np.random.default_rng(seed)
    columns = [rng.normal(size=SHAPE).astype(np.float32) for _ in range(1 + table.num_noises)]
    layout = get_history_layout(table, guidance)
    return DenoisingState(
        table, guidance, layout, columns, conditioning, np.zeros((0, *SHAPE[1:]), np.float32)
    )


def run(states, engine, batch=None):
    batch = batch or BatchBuilder()
    while not states[0].finished:
        batch.evaluate({"unet": engine}, states)
    return [state.latents for state in states]


@pytest.mark.parametrize("sampler", ["DDIM", "Euler a", "DPM++ 2M", "Heun", "UniPC"])
@pytest.mark.parametrize("weights", [(1.0, 0.6), (1.0, -0.5, 2.0), (0.25, 0.75)])
def test_several_prompts_are_composed_as_the_paper_has_it(sampler, weights):
    config = config_from_name(sampler, {"_class_name": "DDIMScheduler"})
    table = sampler_table(config, 6)
    scales = np.where(np.arange(table.evaluations) < 4, 5.0, 1.0)
    guidance = Guidance(scales, weights=weights)
    negative, prompts = -0.4, np.linspace(0.1, 0.8, len(weights))
    state = start(
        table, guidance, build_constant_schedule(schedule_of([negative, *prompts], 1, ()).inputs)
    )
    columns = [state.history.columns[i].reshape(SHAPE) for i in range(1)]
    noises = [
        state.history.columns[state.layout.noise_base + i].reshape(SHAPE).copy()
        for i in range(table.num_noises)
    ]
    evaluation = iter(range(table.evaluations))

    def compose(latents, timestep):
        """Liu et al. 2022, eq. 11, by hand."""
        scale = scales[next(evaluation)]
        unconditional = predict(latents[None], negative)[0].astype(np.float64)
        output = unconditional.copy()
        for weight, prompt in zip(weights, prompts, strict=True):
            output += weight * scale * (predict(latents[None], prompt)[0] - unconditional)
        return output

    expected = sample(table, compose, columns[0].copy(), noises)
    (actual,) = run([state], Engine())
    tolerance = 1e-5 + 2e-6 * np.abs(expected).max()  # weights of opposite signs diverge
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_the_negative_row_is_computed_only_where_it_counts():
    scales = np.array([3.0, 1.0])
    assert Guidance(scales).num_rows.tolist() == [2, 1]
    assert Guidance(scales, weights=(0.5, 0.5)).num_rows.tolist() == [3, 2]
    assert Guidance(scales, weights=(1.0, 1.0)).num_rows.tolist() == [3, 3]
    assert Guidance(scales, weights=(0.5,)).coefficients.tolist() == [[-0.5, 1.5], [0.5, 0.5]]


def test_an_evaluation_reads_its_own_rows():
    table = sampler_table({"_class_name": "DDIMScheduler", "clip_sample": False}, 4)
    guidance = Guidance(np.array([2.0, 2.0, 1.0, 2.0]))
    conditioning = schedule_of([-1, 10, 20], 1, ((0, 1), (0, 2)))
    engine = Engine()
    run([start(table, guidance, conditioning)], engine)
    assert engine.contexts == [[-1, 10], [-1, 20], [20], [-1, 20]]


def test_rows_of_other_images_do_not_matter():
    table = sampler_table({"_class_name": "DDIMScheduler", "clip_sample": False}, 4)
    plain, joined = (Guidance(np.full(4, 2.0), weights=weights) for weights in ((1.0,), (1.0, 0.5)))
    changing = schedule_of([-1, 10, 20, 30], 1, ((0, 1), (0, 2), (0, 1), (0, 3)))
    both = schedule_of([-2, -3, 5, 6], 2, ((0, 2, 3), (1, 2, 3)))
    cases = [(plain, changing, 0), (joined, both, 1), (plain, changing, 2)]
    together = run([start(table, *case) for case in cases], Engine())
    for case, latents in zip(cases, together, strict=True):
        (alone,) = run([start(table, *case)], Engine())
        assert np.array_equal(latents, alone)


def test_what_a_batch_wrote_for_one_image_is_not_read_by_another():
    table = sampler_table({"_class_name": "DDIMScheduler", "clip_sample": False}, 2)
    guidance, batch, engine = Guidance(np.full(2, 2.0)), BatchBuilder(min_rows=4), Engine()
    for value in (10, 20):
        run([start(table, guidance, schedule_of([-1, value], 1, ((0, 1),)))], engine, batch)
    assert engine.contexts == [[-1, 10, 0, 0]] * 2 + [[-1, 20, 0, 0]] * 2


def test_rescaled_guidance_compares_with_the_prompts_together():
    table = sampler_table({"_class_name": "DDIMScheduler", "clip_sample": False}, 1)
    guidance = Guidance(np.full(1, 4.0), rescale=0.7, weights=(1.0, 0.5))
    conditioning = schedule_of([-0.5, 0.2, 0.9], 1, ((0, 1, 2),))
    state = start(table, guidance, conditioning)
    noise = state.latents.copy()
    (actual,) = run([state], Engine())
    negative, first, second = predict(noise[None].repeat(3, 0), [-0.5, 0.2, 0.9])
    together = negative + (first - negative) + 0.5 * (second - negative)
    guided = negative + 4.0 * (first - negative) + 2.0 * (second - negative)
    output = guided * (0.7 * together.std(ddof=1) / guided.std(ddof=1) + 0.3)
    expected = sample(table, lambda *_: output, noise)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_an_input_is_added_to_every_row():
    schedule = schedule_of([-1, -2, 5], 2, ((0, 2), (1, 2)))
    one, two = np.ones((2, 3), np.float32), np.full((2, 3), 2.0, np.float32)
    added = schedule.with_input("tokens", one, two)
    assert added.inputs["tokens"][:, 0, 0].tolist() == [2, 2, 1]
    assert schedule.with_input("tokens", one).inputs["tokens"][:, 0, 0].tolist() == [1, 1, 1]
    assert dict(added.shapes) == {"context": (1, 1), "tokens": (2, 3)}
    assert replace(added, selections=((0, 2), (0, 2))).is_constant and not added.is_constant


def test_a_program_is_of_one_prompt_that_never_changes():
    table = sampler_table({"_class_name": "DDIMScheduler", "clip_sample": False}, 2)
    plain, joined = (Guidance(np.full(2, 2.0), weights=weights) for weights in ((1.0,), (1.0, 0.5)))
    rows = {
        "plain": (plain, schedule_of([-1, 5], 1, ((0, 1), (0, 1)))),
        "changing": (plain, schedule_of([-1, 5, 6], 1, ((0, 1), (0, 2)))),
        "joined": (joined, schedule_of([-1, 5, 6], 1, ((0, 1, 2),))),
    }
    programs = {
        name: build_sampling_program([start(table, *arguments)]) for name, arguments in rows.items()
    }
    assert {name for name, program in programs.items() if program} == {"plain"}
