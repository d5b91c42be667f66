"""Access logs, request ids, and requests with another method or content type."""

import json
import logging

import pytest
from serving import client, run_server, wait_for

from sdrt.serve.logs import JsonFormatter, TextFormatter


@pytest.fixture(scope="module")
def server(shapes):
    with run_server(shapes) as running:
        yield running


def access_records(caplog):
    return [record for record in caplog.records if hasattr(record, "status")]


def test_each_request_has_one_line_in_the_log(server, caplog):
    caplog.set_level(logging.INFO, "sdrt")
    caplog.handler.setFormatter(TextFormatter())
    with client(server) as http:
        response = http.get("/v1/models?x=1", headers={"x-request-id": "abc-1"})
        assert response.headers["x-request-id"] == "abc-1"
    wait_for(lambda: access_records(caplog))
    (line,) = [line for line in caplog.text.splitlines() if "/v1/models" in line]
    time, level, request_id, address, method, path, status, seconds, unit = line.split()
    assert (level, request_id, address) == ("INFO", "abc-1", "127.0.0.1")
    assert (method, path, status, unit) == ("GET", "/v1/models", "200", "s")
    assert time.endswith("Z") and float(seconds) < 60


def test_json_lines_have_the_fields_of_the_request(server, caplog):
    caplog.set_level(logging.INFO, "sdrt")
    caplog.handler.setFormatter(JsonFormatter())
    with client(server) as http:
        response = http.post("/v1/images/generations", json={"prompt": 3})
    wait_for(lambda: access_records(caplog))
    (fields,) = [
        fields for line in caplog.text.splitlines() if "status" in (fields := json.loads(line))
    ]
    assert fields["request_id"] == response.headers["x-request-id"]
    assert (fields["level"], fields["method"], fields["status"]) == ("info", "POST", 400)
    assert fields["path"] == "/v1/images/generations"


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a\tb", '{"a":1}'])
def test_unsafe_request_ids_are_replaced(server, sent):
    with client(server) as http:
        received = http.get("/health/live", headers={"x-request-id": sent}).headers["x-request-id"]
    assert received != sent and received.isalnum()


@pytest.mark.parametrize("path", ["/", "/docs", "/health/live", "/health/ready", "/v1/models"])
def test_head_has_the_headers_of_get(server, path):
    with client(server) as http:
        head, get = http.head(path), http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == str(len(get.content))


def test_head_of_a_post_endpoint_is_not_allowed(server):
    with client(server) as http:
        assert http.head("/v1/images/generations").status_code == 405


def test_wrong_content_types_are_named(server):
    with client(server) as http:
        form = http.post("/v1/images/generations", data={"prompt": "x"})
        body = http.post("/v1/images/edits", json={"prompt": "x"})
    assert form.status_code == body.status_code == 415
    expected = "expected Content-Type application/json, received application/x-www-form-urlencoded"
    assert form.json()["error"]["message"] == expected
    expected = "expected Content-Type multipart/form-data, received application/json"
    assert body.json()["error"]["message"] == expected


def test_startup_names_the_address_and_readiness(shapes, caplog):
    caplog.set_level(logging.INFO, "sdrt")
    with run_server(shapes) as running:
        wait_for(lambda: any("Ready on" in record.message for record in caplog.records))
    address = f"http://127.0.0.1:{running.port}"
    # the access line of the previous test's last request may come at any time
    listening, loaded, ready = [
        record.message
        for record in caplog.records
        if record.name == "sdrt.serve" and not hasattr(record, "status")
    ]
    assert listening == f"Listening on {address}; loading shapes; not ready yet"
    assert loaded.startswith("Loaded model shapes (64x64")
    assert ready.startswith(f"Ready on {address} after ")
