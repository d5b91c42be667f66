"""What an image is estimated to cost, by costs that are set here."""

import pytest

from sdrt.runtime.arguments import parse_options
from sdrt.runtime.batching.cost_model import CostModel, SizeCosts
from sdrt.runtime.batching.estimate import estimate_run

PROMPT = "a red circle"
ONE, TWO, DECODE, ENCODE, SHALLOW = 1.0, 1.5, 100.0, 1000.0, 0.25
COSTS = SizeCosts({1: ONE, 2: TWO}, {1: 1, 2: 1}, 2, 2, DECODE, shallow_ratio=SHALLOW)


def estimate(pipe, prompt=PROMPT, **options):
    options = {"num_inference_steps": 10, "guidance_scale": 5.0, "seed": 0} | options
    job = pipe.with_scheduler("Euler").validate(prompt, parse_options(options))
    return estimate_run(job, CostModel(ENCODE, {(64, 64): COSTS}))


@pytest.mark.parametrize(
    ("options", "evaluations", "shallow", "rows", "denoising"),
    [
        ({}, 10, 0, 20, 10 * TWO),
        ({"guidance_scale": 1.0}, 10, 0, 10, 10 * ONE),
        ({"guidance_interval": (0.2, 0.7)}, 10, 0, 15, 5 * ONE + 5 * TWO),
        ({"feature_reuse": 5}, 10, 8, 20, 2 * TWO + 8 * SHALLOW * TWO),
        ({"prompt": "a cat AND a dog"}, 10, 0, 30, 10 * TWO * 3 / 2),
    ],
)
def test_every_evaluation_counts_by_its_rows(pipe, options, evaluations, shallow, rows, denoising):
    cost = estimate(pipe, **options)
    assert (cost.evaluations, cost.shallow_evaluations, cost.rows) == (evaluations, shallow, rows)
    assert cost.seconds == pytest.approx(ENCODE + denoising + DECODE)


def test_a_second_pass_counts_by_its_size(pipe):
    cost = estimate(pipe, hires_scale=2.0, hires_steps=5)
    assert (cost.evaluations, cost.rows) == (15, 30)
    assert cost.seconds == pytest.approx(ENCODE + 10 * TWO + 4 * (5 * TWO + DECODE))
