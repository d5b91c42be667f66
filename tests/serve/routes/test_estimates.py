"""Costs and token counts of requests that are not sent, compared with runs and the pipeline."""

import httpx
import pytest
from PIL import Image
from serving import PROMPT, client, run_server

pytestmark = pytest.mark.integration

BODY = {"prompt": PROMPT, "num_inference_steps": 10, "seed": 1}


@pytest.fixture(scope="module")
def http(server):
    with client(server) as http:
        yield http


def estimate(http, **fields):
    response = http.post("/v1/images/estimates", json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_estimate_counts_what_a_run_evaluates(http, pipe):
    for options in ({}, {"scheduler": "Heun"}, {"feature_reuse": 3}, {"strength": 0.5}):
        cost = estimate(http, **options)
        name = options.pop("scheduler", None)
        chosen = pipe.with_scheduler(name) if name else pipe
        if "strength" in options:
            options["image"] = Image.new("RGB", (64, 64))
        total = next(iter(chosen.steps(**BODY, **options))).total
        assert cost["evaluations"] == total, options
        assert (cost["shallow_evaluations"] > 0) == ("feature_reuse" in options)
        assert cost["rows"] == 2 * total
        assert cost["seconds"] > 0.0


def test_the_size_is_that_of_the_second_pass(http):
    cost = estimate(http, scheduler="Euler", hires_scale=2.0, hires_steps=5)
    assert (cost["size"], cost["evaluations"]) == ("128x128", 10 + 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", "8000x8000"), ("scheduler", "nonsense"), ("strength", 0.0), ("unknown", 1)],
)
def test_requests_that_would_be_refused_are_refused(http, field, value):
    response = http.post("/v1/images/estimates", json=BODY | {field: value})
    assert response.status_code == 400
    assert field in response.text or str(value) in response.text


@pytest.mark.parametrize(
    "prompt", ["", "a red circle", "a (red:1.2) circle " * 40, "[a red:blue:0.5] circle"]
)
def test_tokens_are_those_of_the_pipeline(http, pipe, prompt):
    counted = http.post("/v1/tokens", json={"prompt": prompt}).json()
    expected = pipe.count_tokens(prompt)
    assert (counted["tokens"], counted["limit"]) == (expected.tokens, expected.limit)


def test_prompts_of_any_length_are_not_counted(http):
    response = http.post("/v1/tokens", json={"prompt": "a" * 40_000})
    assert response.status_code == httpx.codes.BAD_REQUEST


def test_no_model_is_loaded_for_an_estimate(shapes):
    with run_server(shapes, memory_budget=2**40) as server, client(server) as http:
        for path, body in (("/v1/images/estimates", BODY), ("/v1/tokens", {"prompt": PROMPT})):
            response = http.post(path, json=body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "unloaded"
        http.post("/v1/images/generations", json=BODY)
        assert estimate(http)["evaluations"] > 0
