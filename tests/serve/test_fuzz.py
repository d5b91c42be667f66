"""Requests drawn from the server's own schema, right and wrong ones: no answer is a failure.

Most of what is drawn at random names no model and no size that there is, so a second schema has
only values that fit: those requests come through to the engine.
"""

import base64
import copy
from collections import Counter
from io import BytesIO

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from serving import served

from sdrt.serve.app import create_app
from sdrt.serve.settings import Settings

pytestmark = pytest.mark.integration

HEALTH = list(HealthCheck)
FITTING = {
    "model": ["shapes", None],
    "size": ["auto", "64x64", None],
    "width": [64, None],
    "height": [64, None],
    "scheduler": ["Euler a", "DPM++ 2M Karras", "", None],
    "sampler_name": ["Heun", "DPM++ 2M", None],
    "sampler_index": ["Euler", None],
    "override_settings": [{}, {"sd_model_checkpoint": "shapes"}, None],
    "response_format": ["b64_json", None],
    "output_format": ["jpeg", "webp"],
    "stream": [True],
    "num_inference_steps": [1, 2, 4],
    "steps": [1, 2, 4],
    "n": [1, 2, None],
    "batch_size": [1, 2, None],
    "n_iter": [1, None],
    "deadline_seconds": [1e-6, 60.0, None],
    "strength": [0.5, 1.0, None],
    "denoising_strength": [0.5, 1.0, None],
}


def png(mode):
    buffer = BytesIO()
    Image.new(mode, (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def fitting(openapi):
    """The schema with only values that the server has."""
    narrow = copy.deepcopy(openapi)
    text = base64.b64encode(png("L")).decode()
    for component in narrow["components"]["schemas"].values():
        properties = component.get("properties", {})
        for name in set(properties) & set(FITTING):
            properties[name] = {"enum": FITTING[name]}
        if "init_images" in properties:
            properties["init_images"] = {"enum": [[text]]}
            properties["mask"] = {"enum": [text, None]}
        if "image" in properties and "prompt" not in properties:
            properties["image"] = {"enum": [text]}
    return narrow


@pytest.fixture(scope="module")
def server(shapes):
    with served(shapes, max_work=64 * 64 * 8) as running:
        yield running


guard, _ = create_app({}, Settings())
schema = schemathesis.openapi.from_dict(guard.app.openapi())
narrow = schemathesis.openapi.from_dict(fitting(guard.app.openapi()))
MADE = ("/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")


def check(case, server):
    """No 5xx but a refusal, which says when to come again."""
    answer = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=60)
    if not (answer.status_code == 503 and "retry-after" in answer.headers):
        case.validate_response(answer, checks=[not_a_server_error])
    return answer.status_code


def check_fitting(server, path, examples):
    """Requests with values that there are; some of them are made."""
    statuses = Counter()

    @given(case=narrow[path]["POST"].as_strategy(generation_mode=GenerationMode.POSITIVE))
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=HEALTH)
    def drawn(case):
        steps = "num_inference_steps" if "/v1/images" in path else "steps"
        case.body.setdefault(steps, 4)  # half a strength of one step would be none
        if path.endswith("/edits"):
            case.body["image"] = png("RGB")
            if "mask" in case.body:
                case.body["mask"] = png("RGBA")
        statuses[check(case, server)] += 1

    drawn()
    assert statuses[200] >= 1, statuses


@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=HEALTH)
def test_every_endpoint(case, server):
    check(case, server)


@pytest.mark.parametrize("path", MADE)
def test_requests_that_fit(server, path):
    check_fitting(server, path, 15)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=500, deadline=None, suppress_health_check=HEALTH)
def test_every_endpoint_for_long(case, server):
    check(case, server)


@pytest.mark.slow
@pytest.mark.parametrize("path", MADE)
def test_requests_that_fit_for_long(server, path):
    check_fitting(server, path, 500)
