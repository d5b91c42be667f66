"""A real server on a free port, and clients for it."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import httpx

import sdrt
from sdrt.serve.api_keys import ApiKey, KeyLimits, hash_key
from sdrt.serve.model_manager import ModelSource
from sdrt.serve.server import Server
from sdrt.serve.settings import Settings

PROMPT = "a red circle on a blue background"


def api_keys(*names, **limits):
    """Keys that are their names, each with these limits."""
    return tuple(ApiKey(hash_key(name.encode()), name, KeyLimits(**limits)) for name in names)


@contextmanager
def run_server(bundle, names=("shapes",), controlnet=(), refiner=None, **settings):
    """A ready server in a thread; stopped and joined afterwards."""
    options = {"controlnet": controlnet, "refiner": refiner}
    load = partial(sdrt.load, bundle, backend="onnxruntime", **options)
    with run_sources(dict.fromkeys(names, ModelSource(load)), **settings) as server:
        yield server


@contextmanager
def run_sources(sources, **settings):
    """A ready server of these models."""
    server = Server(sources, Settings(port=0, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.models.is_ready)
        yield server
    finally:
        server.should_exit = True
        thread.join()
        server.close()


def wait_for(condition, seconds=120.0):
    """Poll until a condition holds; fails the test on a timeout."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def get_engine(server):
    return server.models.get(None).engine


def client(server, **options):
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60, **options)


def start_process(bundle, folder, *options):
    """A server with jobs in a process of its own, and a client, once it is ready."""
    arguments = ["serve", "--bundle", str(bundle), "--port", "0", "--jobs", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "sdrt", *arguments, "--backend", "onnxruntime", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "Ready on " in line:
            address = line.split("Ready on ")[1].split()[0]
            return process, httpx.Client(base_url=address, timeout=60)
    raise AssertionError(f"ended with {process.wait()}")
