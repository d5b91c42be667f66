"""Webhooks of jobs, sent to a real receiver, which verifies them by code of its own."""

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import os
import signal
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import standardwebhooks
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from serving import PROMPT, client, run_server, start_process, wait_for

from sdrt.cli.arguments.serving import add_serve, settings_from_arguments
from sdrt.errors import UsageError
from sdrt.serve.job_store import COMPLETED, Delivery, JobStore, StoredJob
from sdrt.serve.webhook import WebhookSettings, check_webhook_url, parse_origin, read_secrets
from sdrt.serve.webhook_delivery import WebhookSender

pytestmark = pytest.mark.integration
SECRETS = (bytes(range(32)), b"k" * 24)
TEXTS = [f"whsec_{base64.b64encode(secret).decode()}" for secret in SECRETS]
BODY = {"prompt": PROMPT, "num_inference_steps": 1, "seed": 3}


class Receiver(ThreadingHTTPServer):
    """Stores what it is sent; `answers` are the next statuses, then 204."""

    def __init__(self):
        self.messages, self.answers = [], []
        self.may_answer = threading.Event()
        self.may_answer.set()
        super().__init__(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.messages.append((self.path, dict(self.headers), body))
        self.server.may_answer.wait(60)
        self.send_response(self.server.answers.pop(0) if self.server.answers else 204)
        self.send_header("location", "/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def server(shapes, tmp_path, receiver):
    webhooks = WebhookSettings((parse_origin(receiver.origin),), SECRETS, allow_private=True)
    with run_server(shapes, jobs_folder=tmp_path, webhooks=webhooks) as running:
        running.jobs.sender.first_delay = 0.05
        yield running


def submit(http, webhook):
    response = http.post("/v1/jobs", json={**BODY, "webhook": webhook})
    assert response.status_code == 202, response.text
    return response.json()


def wait_for_webhook(http, job):
    """The job once its webhook is no longer pending."""

    def read():
        return http.get(f"/v1/jobs/{job['id']}").json()

    wait_for(lambda: read()["webhook"]["status"] != "pending", 60.0)
    return read()


def verify(headers, body, secret):
    """As the specification has it."""
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode()
    return f"v1,{digest}" in headers["webhook-signature"].split(" ")


def test_a_job_is_announced_until_it_is_accepted(server, receiver):
    receiver.answers = [500, 302]
    with client(server) as http:
        job = wait_for_webhook(http, submit(http, f"{receiver.origin}/hook?a=1"))
    state = job.pop("webhook")
    assert (state["status"], state["attempts"], state["error"]) == ("delivered", 3, None)
    assert [path for path, _, _ in receiver.messages] == ["/hook?a=1"] * 3  # no redirect
    assert len({headers["webhook-id"] for _, headers, _ in receiver.messages}) == 1
    for _, headers, body in receiver.messages:
        assert all(verify(headers, body, secret) for secret in SECRETS)
        assert not verify(headers, body + b" ", SECRETS[0])
        for text in TEXTS:
            message = standardwebhooks.Webhook(text).verify(body, headers)
        assert message["type"] == "image.job.completed" and message["data"] == job


def test_a_failed_job_is_announced(server, receiver, monkeypatch):
    monkeypatch.setattr("sdrt.serve.routes.jobs.encode_image_file", lambda *_: 1 / 0)
    with client(server) as http:
        wait_for_webhook(http, submit(http, receiver.origin))
    ((path, _, body),) = receiver.messages
    message = json.loads(body)
    assert path == "/" and message["type"] == "image.job.failed"
    assert message["data"]["error"]["code"] == "internal_error"


def test_a_receiver_that_is_gone_gets_no_further_message(server, receiver):
    receiver.answers = [410]
    with client(server) as http:
        job = wait_for_webhook(http, submit(http, receiver.origin))
    assert (job["webhook"]["status"], job["webhook"]["attempts"]) == ("failed", 1)
    assert "410" in job["webhook"]["error"] and len(receiver.messages) == 1


def test_other_receivers_are_refused(server, receiver):
    port = receiver.server_port
    with client(server) as http:
        for url in (
            f"http://127.0.0.1:{port + 1}/",
            f"https://127.0.0.1:{port}/",
            f"http://localhost:{port}/",
            f"http://user@127.0.0.1:{port}/",
            f"{receiver.origin}/#part",
            f"{receiver.origin}\\@example.org/",
            "file:///etc/passwd",
            "x",
        ):
            response = http.post("/v1/jobs", json={**BODY, "webhook": url})
            assert response.status_code == 400, url
            assert "webhook" in response.json()["error"]["message"]
        assert server.jobs.store.jobs == {} and receiver.messages == []


def test_a_server_without_webhooks_refuses_them(shapes, tmp_path):
    with run_server(shapes, jobs_folder=tmp_path) as running, client(running) as http:
        response = http.post("/v1/jobs", json={**BODY, "webhook": "https://example.org"})
        assert response.status_code == 400
        assert "--webhook-origin" in response.json()["error"]["message"]


def open_store(folder, url, keep_seconds):
    """A store with one job that has ended and is not announced."""
    store = JobStore(folder, keep_seconds)
    store.open()
    about = {"owner": "", "model": "m", "digest": "", "idempotency_key": None, "size": "8x8"}
    job = StoredJob("job_1", output_format="png", created_at=1.0, delivery=Delivery(url), **about)
    store.add(job)
    store.end(job, COMPLETED)
    return store


async def deliver(store, settings):
    """What becomes of the webhook of a store's job."""
    sender = WebhookSender(settings, store, lambda job: {"id": job.id}, first_delay=0.01)
    sender.resume()
    async with asyncio.timeout(30):
        while store.jobs["job_1"].delivery.status == "pending":
            await asyncio.sleep(0.01)
    store.close()
    return store.jobs["job_1"].delivery


def test_a_host_is_reached_at_the_first_address_that_answers(tmp_path, receiver, monkeypatch):
    """As where a name has an address of IPv6 that leads nowhere."""
    lookup = socket.getaddrinfo

    def resolve(host, port, *arguments, **options):
        entries = lookup("127.0.0.1", port, *arguments, **options)
        return [(*entry[:4], ("127.0.0.2", port)) for entry in entries] + entries

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"http://name.test:{receiver.server_port}/"
    settings = WebhookSettings((parse_origin(url),), SECRETS, allow_private=True)
    delivery = asyncio.run(deliver(open_store(tmp_path, url, 60.0), settings))
    assert (delivery.status, delivery.attempts, len(receiver.messages)) == ("delivered", 1, 1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_private_addresses_are_not_connected_to(tmp_path, receiver, host):
    """Also where the operator allows a name that resolves to one."""
    url = f"http://{host}:{receiver.server_port}/"
    settings = WebhookSettings((parse_origin(url),), SECRETS)
    delivery = asyncio.run(deliver(open_store(tmp_path, url, 0.2), settings))
    assert delivery.status == "failed" and "not public" in delivery.error
    assert receiver.messages == []


def test_attempts_end_with_the_time_of_the_job(tmp_path, receiver):
    receiver.answers = [500] * 100
    settings = WebhookSettings((parse_origin(receiver.origin),), SECRETS, allow_private=True)
    delivery = asyncio.run(deliver(open_store(tmp_path, receiver.origin, 1.0), settings))
    assert delivery.status == "failed" and "status 500" in delivery.error
    assert 1 <= delivery.attempts == len(receiver.messages) < 10


def test_an_answer_that_is_not_http_is_a_failure(tmp_path):
    async def answer(reader, writer):
        writer.write(b"hello\r\n\r\n")
        writer.close()

    async def run():
        listener = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        settings = WebhookSettings((parse_origin(url),), SECRETS, allow_private=True)
        async with listener:
            return await deliver(open_store(tmp_path, url, 0.0), settings)

    assert asyncio.run(run()).error == "the connection failed"


@pytest.fixture
def certificate(tmp_path):
    """A file with a key and a certificate of localhost that nobody has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, encryption_algorithm=NoEncryption()
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(private + signed.public_bytes(Encoding.PEM))
    return path


@pytest.mark.parametrize("is_trusted", [True, False])
def test_the_certificate_of_a_receiver_is_checked(
    tmp_path, receiver, certificate, is_trusted, monkeypatch
):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    url = f"https://localhost:{receiver.server_port}/hook"
    settings = WebhookSettings((parse_origin(url[:-5]),), SECRETS, allow_private=True)
    store = open_store(tmp_path / "jobs", url, 60.0 if is_trusted else 0.0)
    delivery = asyncio.run(deliver(store, settings))
    if is_trusted:
        assert delivery.status == "delivered" and len(receiver.messages) == 1
    else:
        assert "certificate" in delivery.error and receiver.messages == []


def test_a_killed_server_announces_what_was_finished(shapes, tmp_path, receiver):
    """Killed after the job has ended, while its message was not yet accepted."""
    (tmp_path / "secret").write_text(TEXTS[0] + "\n")
    options = ["--webhook-origin", receiver.origin, "--webhook-private"]
    options += ["--webhook-secret", str(tmp_path / "secret")]
    receiver.may_answer.clear()
    process, http = start_process(shapes, tmp_path / "jobs", *options)
    try:
        job = submit(http, receiver.origin)
        wait_for(lambda: receiver.messages, 60.0)
        assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "completed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    receiver.may_answer.set()
    process, http = start_process(shapes, tmp_path / "jobs", *options)
    try:
        state = wait_for_webhook(http, job)["webhook"]
        assert (state["status"], state["attempts"]) == ("delivered", 1)
    finally:
        process.terminate()
        process.wait()
    first, second = receiver.messages
    assert first[1]["webhook-id"] == second[1]["webhook-id"] and first[2] == second[2]
    assert verify(second[1], second[2], SECRETS[0])


@pytest.mark.parametrize(
    "text",
    ["example.org", "ftp://example.org", "https://example.org/path", "https://", "https://a@b"],
)
def test_an_origin_is_scheme_and_host(text):
    with pytest.raises(UsageError, match="--webhook-origin"):
        parse_origin(text)


def test_origins_compare_by_their_port():
    settings = WebhookSettings((parse_origin("https://Example.org"),), SECRETS)
    check_webhook_url("https://example.ORG:443/a?b=c", settings)
    with pytest.raises(UsageError):
        check_webhook_url("https://example.org:444/", settings)
    assert "kkkk" not in repr(settings)


INVALID_SECRETS = ["", "secret", "whsec_AAAA", "whsec_!!", TEXTS[0][6:], "\n".join(TEXTS * 3)]


@pytest.mark.parametrize("text", INVALID_SECRETS)
def test_an_unusable_secret_is_refused_and_not_shown(tmp_path, text):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_secrets(path)
    assert not any(word in caught.value.message for word in text.split() if word != "secret")


def test_secrets_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    add_serve(parser)
    options = ["--jobs", str(tmp_path), "--webhook-origin", "https://example.org"]
    with pytest.raises(UsageError, match="SDRT_WEBHOOK_SECRET"):
        settings_from_arguments(parser.parse_args(options))
    monkeypatch.setenv("SDRT_WEBHOOK_SECRET", " ".join(TEXTS))
    webhooks = settings_from_arguments(parser.parse_args(options)).webhooks
    assert webhooks.secrets == SECRETS and webhooks.origins == ("https://example.org:443",)
    with pytest.raises(UsageError, match="requires --jobs"):
        settings_from_arguments(parser.parse_args(options[2:]))
