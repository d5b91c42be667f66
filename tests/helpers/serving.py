"""A real server on a free port for tests, and what it is asked with."""

import threading
import time
from contextlib import contextmanager
from functools import partial

import httpx

import sdrt
from sdrt.serve.model_manager import ModelSource
from sdrt.serve.server import Server
from sdrt.serve.settings import Settings

PROMPT = "a red circle on a blue background"


@contextmanager
def served(bundle, names=("shapes",), **settings):
    """The server, ready, in a thread; ended and joined afterwards."""
    load = partial(sdrt.load, bundle, backend="onnxruntime")
    server = Server(dict.fromkeys(names, ModelSource(load)), Settings(port=0, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: set(server.models.states.values()) == {"ready"})
        yield server
    finally:
        server.should_exit = True
        thread.join()
        server.models.close()


def wait_for(holds, seconds=30.0):
    """Until something holds; fails the test if it never does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def engine_of(server):
    return server.models.get(None).engine


def client(server, **options):
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60, **options)
