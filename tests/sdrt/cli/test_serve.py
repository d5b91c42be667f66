"""`sdrt serve` as a process: how it starts, who may call it, how it ends."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest
from serving import PROMPT, wait_for

from sdrt.cli.arguments import add_serve, settings_from_arguments, sources_from_arguments
from sdrt.cli.arguments.common import memory_size
from sdrt.errors import UsageError

pytestmark = pytest.mark.integration

SERVE = [sys.executable, "-m", "sdrt", "serve", "--backend", "onnxruntime"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextmanager
def process(*arguments):
    """A ready server process, and a client."""
    port = free_port()
    command = [*SERVE, "--port", str(port), *map(str, arguments)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def ready():
        try:
            return http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(ready)
        yield running, http
    finally:
        http.close()
        running.kill()
        running.communicate()


def ask(http, responses, **options):
    body = {"prompt": PROMPT, **options}
    thread = threading.Thread(
        target=lambda: responses.append(http.post("/v1/images/generations", json=body))
    )
    thread.start()
    wait_for(lambda: running_images(http) > 0)
    return thread


def running_images(http):
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("sdrt_running{"))


def test_running_requests_finish_on_sigterm(shapes):
    with process("--bundle", shapes) as (running, http):
        responses = []
        asking = ask(http, responses, num_inference_steps=150)
        running.send_signal(signal.SIGTERM)
        wait_for(lambda: http.get("/health/ready").status_code == 503)
        assert http.get("/health/live").status_code == 200
        refused = http.post("/v1/images/generations", json={"prompt": PROMPT})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        asking.join()
        assert responses[0].status_code == 200
        assert running.wait(20) == 0


def test_drain_timeout_cancels_requests(shapes):
    with process("--bundle", shapes, "--drain", "0.3") as (running, http):
        responses = []
        asking = ask(http, responses, num_inference_steps=900, n=4)
        running.send_signal(signal.SIGTERM)
        asking.join()
        assert responses[0].status_code == 503
        assert responses[0].json()["error"]["code"] == "cancelled"
        assert running.wait(20) == 0


def test_json_log_lines(shapes):
    with process("--bundle", shapes, "--log-format", "json") as (running, http):
        assert http.get("/v1/models").status_code == 200
        running.terminate()
        lines = [json.loads(line) for line in running.stderr.read().splitlines() if line[0] == "{"]
    assert all(line.keys() >= {"time", "level", "request_id", "message"} for line in lines)
    assert any(line["message"].startswith("Ready on http://127.0.0.1:") for line in lines)
    assert any(line.get("path") == "/v1/models" and line["status"] == 200 for line in lines)


def test_key_file(shapes, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret\n\n")
    with process("--bundle", shapes, "--keys", keys) as (_, http):
        assert http.get("/v1/models").status_code == 401
        right = http.get("/v1/models", headers={"authorization": "Bearer secret"})
        assert right.json()["data"][0]["id"] == "shapes"


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "--keys"),
        (["--keys", "no-such-file"], 2, "no-such-file"),
        (["--keys", os.devnull], 2, "no API key"),
        (["--port", "70000"], 2, "70000"),
        (["--drain", "-1"], 2, "--drain"),
        (["--drain", "nan"], 2, "--drain"),
        (["--slots", "0"], 2, "--slots 0"),
        (["--memory-budget", "8"], 2, "'8' is not a size such as 8GB"),
        (["--memory-budget", "1MB"], 2, "the memory budget is 1 MB"),
        (["--memory-budget", "8GB", "--pin", "x"], 2, "expected one of shapes"),
        (["--pin", "shapes"], 2, "--pin requires --memory-budget"),
        (["--bundle", "none-such"], 3, "none-such"),
        (["--host", "203.0.113.1", "--no-keys"], 2, "cannot listen"),
    ],
)
def test_invalid_arguments_exit_with_a_message(shapes, arguments, code, words):
    bundle = [] if "--bundle" in arguments else ["--bundle", str(shapes)]
    port = [] if "--port" in arguments else ["--port", str(free_port())]
    done = subprocess.run([*SERVE, *bundle, *port, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), ("2 TiB", 2**41)],
)
def test_sizes_of_memory(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "0GB", "8 bytes", "1e3MB", "nanGB"])
def test_other_texts_are_no_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 8GB"):
        memory_size(text)


def test_models_of_the_command_line_are_described_before_they_are_loaded(shapes):
    arguments = ["--bundle", str(shapes), "--controlnet", "outline", "--memory-budget", "1GB"]
    parser = argparse.ArgumentParser()
    add_serve(parser)
    args = parser.parse_args([*arguments, "--pin", "shapes", "--load-timeout", "5"])
    (source,) = sources_from_arguments(args).values()
    assert source.manifest.sizes and source.controlnets == ("outline",)
    weights = sum((shapes / name).stat().st_size for name in ("unet/model.safetensors",))
    assert weights < source.estimated_bytes < 10**9
    settings = settings_from_arguments(args)
    assert settings.memory_budget == 10**9 and settings.pinned_models == ("shapes",)
    assert settings.load_timeout_seconds == 5.0
    args.ray = True
    with pytest.raises(UsageError, match="with --ray is unsupported"):
        settings_from_arguments(args)


def test_models_are_compiled_for_the_size_of_the_command_line(shapes):
    pytest.importorskip("openvino")
    from sdrt.engine.openvino.static_shape import StaticShapeEngine

    parser = argparse.ArgumentParser()
    add_serve(parser)
    arguments = ["--bundle", str(shapes), "--backend", "openvino", "--static-size", "64x64"]
    (source,) = sources_from_arguments(parser.parse_args(arguments)).values()
    with source.load() as pipe:
        assert isinstance(pipe.engines["unet"], StaticShapeEngine)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--static-size", "64by64"], "64by64"),
        (["--static-size", "72x64", "--backend", "openvino"], "72x64 is not in this bundle"),
        (["--static-size", "64x64"], "only for the openvino backend"),
    ],
)
def test_a_wrong_static_size_is_refused_before_a_model_is_loaded(shapes, wrong, message):
    parser = argparse.ArgumentParser()
    add_serve(parser)
    with pytest.raises(UsageError, match=message):
        sources_from_arguments(parser.parse_args(["--bundle", str(shapes), *wrong]))


def test_missing_extra_says_what_to_install(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ImportError('no', name='uvicorn')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(SERVE, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "pip install 'sdrt[serve]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_bundles_with_one_name_are_rejected(shapes):
    command = [*SERVE, "--bundle", str(shapes), "--bundle", str(shapes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert json.dumps("shapes").strip('"') in done.stderr
