"""Malicious requests and disconnects, over plain sockets to a real server."""

import base64
import json
import logging
import socket
import struct
import threading
import time
import zlib
from contextlib import closing
from io import BytesIO

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import PROMPT, api_keys, client, get_engine, run_server, wait_for

from sdrt.errors import BackendError, DeviceLostError
from sdrt.serve.server import raise_open_file_limit

pytestmark = pytest.mark.integration

LONG = {"prompt": PROMPT, "num_inference_steps": 900}
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def server(shapes):
    with run_server(
        shapes, max_body_bytes=2**20, body_seconds=1.0, header_seconds=0.5, stall_seconds=1.0
    ) as running:
        yield running


def open_socket(server):
    return closing(socket.create_connection(("127.0.0.1", server.port), timeout=20))


def head(length=None, **more):
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def read_response(sock):
    """Read until the server closes the connection."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def post(server, body):
    with client(server) as http:
        return http.post(PATH, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b"{",
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "x"}',
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "x", "seed": 1, "seed": 2}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"prompt": "' + b"x" * 32_001 + b'"}',
    ],
)
def test_invalid_bodies(server, body):
    response = post(server, body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]
    assert post(server, b'{"prompt": "x", "num_inference_steps": 1}').status_code == 200


def test_deeply_nested_json_is_rejected(server):
    for body in (b"[" * 100_000, b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"):
        error = post(server, body).json()["error"]
        assert error["message"] == "the JSON body is nested too deeply"


def test_large_body_is_rejected_before_it_is_read(server):
    with open_socket(server) as sock:
        sock.sendall(head(100_000_000))  # and none of it
        assert sock.recv(20).startswith(b"HTTP/1.1 413")


def test_large_chunked_body_is_rejected(server):
    with open_socket(server) as sock:
        sock.sendall(head(Transfer_Encoding="chunked"))
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(40):
            sock.sendall(piece)
        sock.sendall(b"0\r\n\r\n")
        assert read_response(sock).startswith(b"HTTP/1.1 413")


def test_response_to_a_large_body_is_readable(server):
    assert post(server, b"x" * 8_000_000).status_code == 413


def test_body_in_tiny_chunks(server):
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 1}).encode()
    with open_socket(server) as sock:
        sock.sendall(head(Transfer_Encoding="chunked", Connection="close"))
        for byte in body:
            sock.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        assert read_response(sock).startswith(b"HTTP/1.1 200")


def test_slow_body_times_out(server):
    with open_socket(server) as sock:
        sock.sendall(head(1000) + b"{")
        assert sock.recv(20).startswith(b"HTTP/1.1 408")


def test_slow_headers_time_out(server):
    with open_socket(server) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\n")
        assert read_response(sock) == b""
    with open_socket(server) as sock:  # one that says nothing is left alone
        time.sleep(0.8)
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in read_response(sock)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_slots(server, stream):
    engine = get_engine(server)
    body = json.dumps({**LONG, "n": 3, "stream": stream}).encode()
    with open_socket(server) as sock:
        sock.sendall(head(len(body)) + body)
        wait_for(lambda: any(ticket.evaluations_done > 1 for ticket in engine.unfinished()))
        assert len(engine.unfinished()) == 3
    wait_for(lambda: not engine.unfinished(), 2.0)


@pytest.mark.rest
def test_unread_response_frees_slots(server):
    engine = get_engine(server)
    post = {"n": 10, "stream": True, "progress": True, "partial_images": 100}
    body = json.dumps({**LONG, **post}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", server.port))
    with closing(sock):
        sock.sendall(head(len(body)) + body)
        wait_for(lambda: engine.unfinished())
        wait_for(lambda: not engine.unfinished(), 60.0)
        states = scrape(server)["sdrt_pictures_total"]
        assert states[("shapes", "cancelled")] >= 1


def test_two_thousand_idle_connections(server):
    resource = pytest.importorskip("resource")
    raise_open_file_limit()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4200:
        pytest.skip("this process may not have 4200 open files, both ends of 2000 connections")
    socks = []
    try:
        for _ in range(2000):
            socks.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        ask = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for sock in socks[::100]:
            sock.sendall(ask)
            assert b"200 OK" in sock.recv(4096)
        assert post(server, b'{"prompt": "x", "num_inference_steps": 1}').status_code == 200
    finally:
        for sock in socks:
            sock.close()


def png(width, height, data=b"", text=b""):
    """A PNG with an arbitrary header."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    shape = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + shape + text + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb():
    body = b"parameters\0\0" + zlib.compress(b"x" * 50_000_000)
    return (
        struct.pack(">I", len(body))
        + b"zTXt"
        + body
        + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    )


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"no picture",
        png(2**31 - 1, 2**31 - 1),
        png(50_000, 50_000, zlib.compress(b"")),
        png(5000, 5000, zlib.compress(b"\0" * 1000)),
        png(64, 64, b"damaged"),
        png(64, 64, zlib.compress(b"\0" * 10)),
        png(0, 0),
        png(64, 64, zlib.compress(b"\0" * 64 * 193), bomb()),
    ],
)
def test_malicious_images(server, image):
    before = _resident(server)
    with client(server) as http:
        response = http.post(
            "/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", image)}
        )
    assert response.status_code == 400, response.text
    assert _resident(server) - before < 100e6


def _resident(server):
    return scrape(server)["process_resident_memory_bytes"][()]


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({"prompt": "x"}, {}),
        ({}, {"image": b""}),
        ({"prompt": "x", "image": "text"}, {}),
        ({"prompt": "x", "n": "x"}, {"image": None}),
        ({"prompt": "x", "strength": "nan"}, {"image": None}),
        ({"prompt": "x", "foo": "1"}, {"image": None}),
        ({"prompt": ["x", "y"]}, {"image": None}),
        ({"prompt": "x"}, {"image": None, "image[]": None}),
        ({"prompt": "x"}, {"image": None, "mask": None}),
        ({"prompt": "x"}, {"image": None, "other": None}),
    ],
)
def test_invalid_form_fields(server, fields, files):
    buffer = BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    sent = {
        name: ("a.png", buffer.getvalue() if data is None else data) for name, data in files.items()
    }
    with client(server) as http:
        response = http.post("/v1/images/edits", data=fields, files=sent)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"--x", b"--x\r\n\r\n--x--", b"\r\n" * 100])
def test_malformed_forms(server, body):
    with client(server) as http:
        kind = {"content-type": "multipart/form-data; boundary=x"}
        assert http.post("/v1/images/edits", content=body, headers=kind).status_code == 400
        assert http.post("/v1/images/edits", content=body).status_code == 415


def test_cross_origin_requests_are_refused(server):
    with client(server) as http:
        own = f"http://127.0.0.1:{server.port}"
        assert http.get("/v1/models", headers={"origin": own}).status_code == 200
        for origin in (
            "http://evil.example",
            "null",
            "http://127.0.0.1:1",
            f"{own}0",
            "http://[",
            "",
        ):
            response = http.get("/v1/models", headers={"origin": origin})
            assert response.status_code == 403, origin
        # A name that its owner points at this machine.
        for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", ""):
            assert http.get("/v1/models", headers={"host": host}).status_code in (400, 403), host


def test_api_keys(shapes):
    keys = api_keys("one", "two")
    with run_server(shapes, keys=keys) as server, client(server) as http:
        for path in ("/v1/models", "/sdapi/v1/progress", "/metrics", "/v1/none", "//v1/models"):
            response = http.get(path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
        for wrong in (
            {"authorization": "Bearer three"},
            {"x-api-key": ""},
            {"authorization": "one"},
        ):
            assert http.get("/v1/models", headers=wrong).status_code == 401
        for right in ({"authorization": "Bearer two"}, {"x-api-key": "one"}):
            assert http.get("/v1/models", headers=right).status_code == 200
        for path in ("/health/live", "/health/ready", "/openapi.json"):
            assert http.get(path).status_code == 200
        # The body of an unauthenticated client is not read.
        assert http.post(PATH, content=b"x" * 50_000_000).status_code in (401, 413)


@pytest.mark.rest
def test_interrupt_is_limited_to_the_same_key(shapes):
    with run_server(shapes, keys=api_keys("one", "two")) as server:
        mine, other = ({"x-api-key": name} for name in ("one", "two"))
        responses = []
        body = {"prompt": PROMPT, "steps": 200}

        def ask():
            with client(server, headers=mine) as http:
                responses.append(http.post("/sdapi/v1/txt2img", json=body).json())

        asking = threading.Thread(target=ask)
        asking.start()
        with client(server, headers=other) as http:
            wait_for(lambda: get_engine(server).unfinished())
            assert http.get("/sdapi/v1/progress").json()["progress"] == 0.0
            http.post("/sdapi/v1/interrupt")
        asking.join()
        assert len(responses[0]["images"]) == 1


def scrape(server):
    """The metrics of a Prometheus scrape: {sample name: {label values: value}}."""
    with client(server) as http:
        text = http.get("/metrics").text
    actual = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            actual.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return actual


def test_metrics_count_requests(shapes):
    with run_server(shapes) as server:
        post(server, b'{"prompt": "x", "num_inference_steps": 2, "n": 3, "scheduler": "Euler"}')
        post(server, b'{"prompt": "x", "deadline_seconds": 0.000001}')
        post(server, b'{"prompt": ')
        actual = scrape(server)
    assert actual["sdrt_pictures_total"] == {("shapes", "done"): 3.0}
    assert actual["sdrt_refused_total"] == {("deadline", "shapes"): 1.0}
    assert actual["sdrt_picture_seconds_count"] == {("shapes",): 3.0}
    for phase in ("queue", "denoise", "decode"):
        assert actual["sdrt_phase_seconds_count"][("shapes", phase)] == 3.0
    assert actual["sdrt_rows_per_call_sum"] == {("shapes",): 12.0}  # 3 images, 2 rows, 2 steps
    assert actual["sdrt_running"] == {("shapes",): 0.0}
    assert actual["sdrt_waiting"] == {("shapes",): 0.0}
    responses = actual["sdrt_http_responses_total"]
    assert {status: responses[(PATH, status)] for status in ("200", "503", "400")} == {
        "200": 1.0,
        "503": 1.0,
        "400": 1.0,
    }
    assert actual["process_resident_memory_bytes"][()] > 1e6


class Faulty:
    """A UNet whose device fails for a number of calls."""

    def __init__(self, unet, failures, error=BackendError):
        self.unet, self.failures, self.error = unet, failures, error
        self.inputs, self.outputs, self.close = unet.inputs, unet.outputs, unet.close

    def __call__(self, feeds):
        if self.failures:
            self.failures -= 1
            raise self.error("the device fell off")
        return self.unet(feeds)


def test_server_recovers_from_a_failing_engine(shapes):
    small = b'{"prompt": "x", "num_inference_steps": 2}'
    with run_server(shapes) as server, client(server) as http:
        engines = get_engine(server).pipe.engines
        faulty = engines["unet"] = Faulty(engines["unet"], 10**9)
        response = post(server, small)
        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": "the device fell off",
            "type": "server_error",
            "param": None,
            "code": "engine_error",
        }
        wait_for(lambda: http.get("/health/ready").status_code == 503)
        assert http.get("/health/ready").json()["models"] == {"shapes": "broken"}
        assert http.get("/health/live").status_code == 200
        refused = post(server, small)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "broken"
        faulty.failures = 0
        wait_for(lambda: http.get("/health/ready").status_code == 200)
        assert post(server, small).status_code == 200


def test_a_server_whose_gpu_is_lost_stops_so_that_another_is_started(shapes, monkeypatch):
    small = b'{"prompt": "x", "num_inference_steps": 2}'
    with run_server(shapes) as server, client(server) as http:
        monkeypatch.setattr(server, "shut_down", lambda: None)  # to look at it meanwhile
        engines = get_engine(server).pipe.engines
        engines["unet"] = Faulty(engines["unet"], 10**9, DeviceLostError)
        assert post(server, small).status_code == 500
        assert http.get("/health/live").status_code == 503
        assert http.get("/health/ready").json()["models"] == {"shapes": "lost"}
        refused = post(server, small)
        assert refused.status_code == 503 and "fell off" in refused.json()["error"]["message"]
        monkeypatch.undo()
        server.device_error = None  # and now it stops by itself
        wait_for(lambda: server.should_exit)
        assert DeviceLostError.exit_code == 7 and isinstance(server.device_error, DeviceLostError)


def test_prompts_are_logged_only_on_request(shapes, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "sdrt")
    secret = "a secret circle"
    body = json.dumps({"prompt": secret, "num_inference_steps": 1}).encode()
    wrong = json.dumps({"prompt": secret, secret: 1, "seed": secret}).encode()
    for message in (False, True):
        caplog.clear()
        with run_server(shapes, log_prompts=message) as server:
            assert post(server, body).status_code == 200
            assert post(server, wrong).status_code == 400
        ours = [record for record in caplog.records if not record.name.startswith("http")]
        assert ours
        assert any(secret in record.getMessage() for record in ours) is message


def test_fuzz_responses_are_images(server):
    response = post(server, b'{"prompt": "x", "num_inference_steps": 1}').json()
    assert Image.open(BytesIO(base64.b64decode(response["data"][0]["b64_json"]))).size == (64, 64)
