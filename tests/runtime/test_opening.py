"""Loading: in threads that can be left, by libraries that are used by one thread first."""

import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdrt import progress
from sdrt.engine.call_once import call_once
from sdrt.errors import BackendError
from sdrt.runtime.opening import open_concurrently

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from first_load import hung

SECONDS = 60


class Engine:
    def __init__(self):
        self.closed = threading.Event()

    def close(self):
        self.closed.set()


def test_components_are_opened_side_by_side_and_come_in_order():
    together = threading.Barrier(2)

    def open_one():
        together.wait(SECONDS)
        return Engine()

    assert list(open_concurrently({"unet": open_one, "vae_decoder": open_one})) == [
        "unet",
        "vae_decoder",
    ]


def test_none_stays_open_where_one_fails():
    begun, result = threading.Event(), Engine()

    def fails():
        begun.set()
        raise BackendError("it does not load")

    def slow():
        assert begun.wait(SECONDS)
        time.sleep(0.05)
        return result

    with pytest.raises(BackendError, match="it does not load"):
        open_concurrently({"unet": slow, "vae_decoder": fails})
    assert result.closed.is_set()


def test_what_is_opened_after_an_interruption_is_closed(monkeypatch):
    go_on, early, late = threading.Event(), Engine(), Engine()

    def slow():
        assert go_on.wait(SECONDS)
        return late

    def interrupted(what):
        while "vae_decoder" in what():
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr("sdrt.runtime.opening.log_progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_concurrently({"unet": slow, "vae_decoder": lambda: early})
    assert early.closed.is_set() and not late.closed.is_set()
    go_on.set()
    assert late.closed.wait(SECONDS)


def test_what_is_loading_is_named(monkeypatch, caplog):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    caplog.set_level(logging.INFO, "sdrt")

    def slow():
        while "loading unet: 0 s so far" not in caplog.text:
            time.sleep(0.001)
        return Engine()

    open_concurrently({"unet": slow})  # or this takes for ever


def test_a_library_is_first_used_by_one_thread():
    inside, seen = [], []

    @call_once
    def initialise():
        inside.append(1)
        time.sleep(0.02)
        seen.append(len(inside))

    def use():
        initialise()
        assert seen  # nobody goes on before it is done

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1]


SLOW = """
import sys, time
import sdrt
from sdrt import cli
from sdrt.engine.onnxruntime.cpu import OrtEngine
def slow(*_, **__):
    print("loading", flush=True)
    time.sleep({seconds})
OrtEngine.__init__ = slow
"""
EXITS = {
    "the command line": (
        'sys.argv = ["sdrt", "run", "x", "--bundle", {bundle!r}, "--backend", "onnxruntime"]\n'
        "sys.exit(cli.entry())",
        130,
    ),
    "a script": ('sdrt.load({bundle!r}, backend="onnxruntime")', -signal.SIGINT),
}


@pytest.mark.parametrize("program", EXITS)
def test_ctrl_c_ends_a_load_at_once(shapes, tmp_path, program):
    text, code = EXITS[program]
    script = SLOW.format(seconds=SECONDS) + text.format(bundle=str(shapes))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert "loading" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=SECONDS / 2)[1]
    finally:
        process.kill()
    assert process.returncode == code and "terminate" not in said, said


def test_unfinished_folders_are_cleared_when_a_process_is_left(tmp_path):
    script = """
import sys, threading, time
from pathlib import Path
from sdrt.atomic_files import build_once
from sdrt.process_exit import exit_now, start_workers
begun = threading.Event()
def fill(folder):
    (folder / "half").write_text("half")
    begun.set()
    time.sleep(60)
target = Path(sys.argv[1])
start_workers([threading.Thread(target=build_once, args=(target, fill), daemon=True)])
begun.wait()
exit_now(130)
"""
    actual = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x")], timeout=SECONDS / 2
    )
    assert actual.returncode == 130
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_the_first_load_of_a_fresh_process_ends(shapes, backend):
    assert hung(shapes, backend, processes=20, at_once=2, seconds=90.0) == 0
