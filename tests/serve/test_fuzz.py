"""Requests generated from the server's own schema, valid and invalid: no response is a 5xx.

Most of what is drawn at random names no model and no size that there is, so a second schema has
only values that fit: those requests come through to the engine.
"""

import base64
import copy
import subprocess
import sys
from collections import Counter
from io import BytesIO

import pytest
from PIL import Image
from serving import run_server

from sdrt.serve.app import create_app
from sdrt.serve.settings import Settings

pytestmark = pytest.mark.integration

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
    """The schema, limited to values that the server supports."""
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
    with run_server(shapes, max_work=64 * 64 * 8) as running:
        yield running


@pytest.fixture(scope="module")
def openapi():
    guard, _ = create_app({}, Settings())
    return guard.app.openapi()


GENERATING = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
)


def check(case, server):
    """No 5xx except a rejection with Retry-After."""
    from schemathesis.checks import not_a_server_error

    response = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=60)
    if not (response.status_code == 503 and "retry-after" in response.headers):
        case.validate_response(response, checks=[not_a_server_error])
    return response.status_code


def run_cases(check_case, strategy, examples, **options):
    """Call `check_case` with so many requests."""
    from hypothesis import HealthCheck, given, settings

    limits = settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), **options
    )
    limits(given(case=strategy)(check_case))()


def check_every_endpoint(server, openapi, examples, **options):
    """Requests that the schema allows, and requests that it rules out."""
    import schemathesis
    from hypothesis import strategies
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_dict(openapi)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} == set(openapi["paths"])
    for operation in operations:

        def check_case(case):
            check(case, server)

        modes = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]
        run_cases(check_case, strategies.one_of(modes), examples, **options)


def check_fitting(server, openapi, path, examples, **options):
    """Requests with supported values; some of them succeed."""
    import schemathesis
    from schemathesis.generation import GenerationMode

    statuses = Counter()
    operation = schemathesis.openapi.from_dict(fitting(openapi))[path]["POST"]

    def check_case(case):
        steps = "num_inference_steps" if "/v1/images" in path else "steps"
        case.body.setdefault(steps, 4)  # half a strength of one step would be none
        if path.endswith("/edits"):
            case.body["image"] = png("RGB")
            if "mask" in case.body:
                case.body["mask"] = png("RGBA")
        statuses[check(case, server)] += 1

    strategy = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    run_cases(check_case, strategy, examples, **options)
    assert statuses[200] >= 1, statuses


def test_fuzz_every_endpoint(server, openapi):
    check_every_endpoint(server, openapi, 15, derandomize=True)


@pytest.mark.parametrize("path", GENERATING)
def test_fuzz_valid_requests(server, openapi, path):
    check_fitting(server, openapi, path, 15, derandomize=True)


@pytest.mark.rest
def test_every_field_at_its_bounds(server, tmp_path):
    """Schemathesis' own command, in its phase that gives each field its limits in turn."""
    config = tmp_path / "schemathesis.toml"
    config.write_text("[checks.not_a_server_error]\nexpected-statuses = ['2xx', '4xx', 503]\n")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += ["--config-file", config, "run", "--phases", "coverage"]
    command += ["--checks", "not_a_server_error", f"http://127.0.0.1:{server.port}/openapi.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_fuzz_every_endpoint_long(server, openapi):
    check_every_endpoint(server, openapi, 500)


@pytest.mark.slow
@pytest.mark.parametrize("path", GENERATING)
def test_fuzz_valid_requests_long(server, openapi, path):
    check_fitting(server, openapi, path, 500, derandomize=True)
