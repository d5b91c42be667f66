"""Requests drawn from the server's own schema, right and wrong ones: no answer is a failure."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from serving import served

from sdrt.serve.app import application
from sdrt.serve.settings import Settings

HEALTH = list(HealthCheck)


@pytest.fixture(scope="module")
def server(shapes):
    with served(shapes, most_work=64 * 64 * 8) as running:
        yield running


guard, _ = application({}, Settings())
schema = schemathesis.openapi.from_dict(guard.app.openapi())


def check(case, server):
    """No 5xx but a refusal, which says when to come again."""
    answer = case.call(base_url=f"http://127.0.0.1:{server.port}", timeout=60)
    if not (answer.status_code == 503 and "retry-after" in answer.headers):
        case.validate_response(answer, checks=[not_a_server_error])


@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=HEALTH)
def test_every_endpoint(case, server):
    check(case, server)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=500, deadline=None, suppress_health_check=HEALTH)
def test_every_endpoint_for_long(case, server):
    check(case, server)
