"""Traces of requests, as OpenTelemetry's SDK and a receiver of OTLP have them."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serving import PROMPT, client, get_engine, run_server, wait_for

from sdrt.errors import BackendError
from sdrt.serve.tracing import Tracing, open_tracing

pytestmark = pytest.mark.integration
BODY = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 2**64 - 2}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = ["queue", "prepare", "denoise", "decode"]


@pytest.fixture(scope="module")
def exporter():
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def server(shapes, exporter, tmp_path_factory):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    folder = tmp_path_factory.mktemp("jobs")
    with run_server(shapes, tracing=Tracing(provider), jobs_folder=folder) as running:
        yield running


@pytest.fixture
def http(server, exporter):
    exporter.clear()
    with client(server) as opened:
        yield opened


def wait_for_spans(exporter, name):
    """The finished spans, by the end of the request's own."""
    wait_for(lambda: any(span.name == name for span in exporter.get_finished_spans()))
    return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_phases(http, exporter, stream):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    path = "/v1/images/generations"
    body = {**BODY, "n": 2, "stream": stream}
    assert http.post(path, json=body, headers=headers).status_code == 200
    request, *children = wait_for_spans(exporter, f"POST {path}")
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT and request.kind is SpanKind.SERVER
    expected = {
        "http.request.method": "POST",
        "http.route": path,
        "url.path": path,
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "gen_ai.operation.name": "generate_content",
        "gen_ai.output.type": "image",
        "gen_ai.request.model": "shapes",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.seed": -2,
        "sdrt.size": "64x64",
        "sdrt.steps": 3,
    }
    assert expected.items() <= request.attributes.items()
    assert PROMPT not in str([span.to_json() for span in (request, *children)])
    assert {child.parent.span_id for child in children} == {request.context.span_id}
    encode = [child for child in children if child.name == "encode"]
    assert len(encode) == (2 if stream else 1)
    for index in range(2):
        own = [c for c in children if c.attributes.get("sdrt.image.index") == index]
        assert [child.name for child in own] == PHASES
        for before, after in pairwise(own):
            assert before.start_time <= before.end_time <= after.start_time + 1000
        assert own[2].attributes["sdrt.evaluations"] == 4  # of PNDM's 3 steps
    assert all(request.start_time <= c.start_time <= request.end_time for c in children)


def test_a1111s_requests_and_jobs_are_traced(http, exporter):
    http.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": 1})
    spans = wait_for_spans(exporter, "POST /sdapi/v1/txt2img")
    assert [span.name for span in spans[1:]] == [*PHASES, "encode"]
    exporter.clear()
    job = http.post("/v1/jobs", json=BODY).json()
    request, *children = wait_for_spans(exporter, "encode")
    assert request.name == "POST /v1/jobs" and [c.name for c in children] == [*PHASES, "encode"]
    assert {c.context.trace_id for c in children} == {request.context.trace_id}
    exporter.clear()
    http.get(f"/v1/jobs/{job['id']}")
    (read,) = wait_for_spans(exporter, "GET /v1/jobs/{job_id}")
    assert job["id"] in read.attributes["url.path"]


def test_errors_are_those_of_the_conventions(http, server, exporter, monkeypatch):
    assert http.post("/v1/images/generations", json={}).status_code == 400
    assert http.request("PURGE", "/nowhere").status_code == 404
    wrong, unknown = wait_for_spans(exporter, "_OTHER")
    assert wrong.attributes["http.response.status_code"] == 400
    assert wrong.status.status_code is StatusCode.UNSET
    assert "http.route" not in unknown.attributes
    exporter.clear()
    engines = get_engine(server).pipe.engines

    class Broken(type(engines["vae_decoder"])):
        def __init__(self):
            pass

        def __call__(self, *_, **__):
            raise BackendError(f"no {PROMPT}")

    monkeypatch.setitem(engines, "vae_decoder", Broken())
    assert http.post("/v1/images/generations", json=BODY).status_code == 500
    request, *children = wait_for_spans(exporter, "POST /v1/images/generations")
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes["error.type"] == "500"
    assert children[-1].name == "decode" and children[-1].attributes["error.type"]
    assert children[-1].status.status_code is StatusCode.ERROR
    assert PROMPT not in str([span.to_json() for span in (request, *children)])


def test_probes_are_not_traced(http, exporter):
    for path in ("/health/live", "/metrics", "/page/index.html"):
        http.get(path)
    http.get("/v1/models")
    assert [span.name for span in wait_for_spans(exporter, "GET /v1/models")] == ["GET /v1/models"]


def test_spans_are_sent_by_otlp(shapes, monkeypatch):
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        tracing = open_tracing()
        with run_server(shapes, tracing=tracing) as running, client(running) as http:
            assert http.post("/v1/images/generations", json=BODY).status_code == 200
        tracing.close()
        collector.shutdown()
        thread.join()
    assert {path for path, _ in received} == {"/v1/traces"}
    resources = [resource for _, message in received for resource in message.resource_spans]
    names = [s.name for r in resources for scope in r.scope_spans for s in scope.spans]
    assert sorted(names) == sorted([*PHASES, "encode", "POST /v1/images/generations"])
    about = {a.key: a.value.string_value for a in resources[0].resource.attributes}
    assert about["service.name"] == "sdrt"


def test_a_server_without_tracing_imports_no_sdk():
    code = (
        "import sys, sdrt.serve.server; from sdrt.serve.tracing import Tracing\n"
        "with Tracing().start_request('GET', '/', None, {}) as span: span.set_response('/', 200)\n"
        "assert not {'opentelemetry.sdk', 'opentelemetry.exporter'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
