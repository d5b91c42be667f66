"""The GPU benchmark without a GPU: it says so, and what it would time runs."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdrt.engine.gpu import detect_gpus

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    yield from imported("gpu")


@pytest.fixture(scope="module")
def contestants(benchmark):
    return sys.modules["gpu_contestants"]


def imported(name):
    """A module of `benchmarks`, which is no package."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("script", ["benchmarks/gpu.py", "tools/gpu_check.py"])
def test_without_a_gpu_it_is_refused_with_the_reason(script):
    if detect_gpus().gpus:
        pytest.skip("there is a GPU")
    command = [sys.executable, str(FOLDER.parent / script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no NVIDIA GPU on this machine" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_engine_has_its_reason(contestants):
    for device in ("cuda", "cpu"):
        assert set(contestants.explain_missing(device)) == set(contestants.CONTESTANTS)
    on_cpu = contestants.explain_missing("cpu")
    assert [name for name in on_cpu if not on_cpu[name]] == [
        *("torch compiled", "torch", "onnxruntime", "diffusers compiled", "diffusers"),
    ]


def test_it_runs_on_the_cpu_and_saves_after_every_engine(tmp_path):
    """Worker processes, the times that they answer, one that is stopped, and the table."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--model", "shapes"]
    command += ["--sizes", "32x32", "--rows", "1,2", "--steps", "1", "--rounds", "2"]
    command += ["--engines", "onnxruntime,torch graphs", "--work", str(tmp_path / "work")]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch graphs: skipped: CUDA graphs need a GPU" in done.stderr
    figures = json.loads(out.read_text())
    parts = figures["engines"]["onnxruntime"]["parts"]
    assert list(parts) == [
        *("text encoder", "UNet 32x32, 1 rows", "UNet 32x32, 2 rows", "decode 32x32"),
        "picture 32x32, 1 steps",
    ]
    assert all(at["p50"] > 0 and at["calls"] >= 1 for at in parts.values())
    assert figures["ceilings"]["copy, GB/s"] > 0 and "| decode 32x32 |" in done.stdout


def test_an_engine_that_takes_too_long_is_stopped(benchmark, tmp_path, monkeypatch):
    names = ("parts", "sizes", "rows", "steps")
    args = argparse.Namespace(device="cpu", work=tmp_path, seconds=0.5, rounds=2)
    vars(args).update(dict.fromkeys(names, "1"))
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen(sleeping, **options))
    assert benchmark.measure("torch", args) == {"parts": {}, "failed": "out of time"}


@pytest.mark.rest
@pytest.mark.reference
def test_every_part_of_the_reference_runs(contestants, embedded):
    selection = contestants.Selection(sizes=("64x64",), rows=(1, 2), steps=(1,))
    parts = contestants.reference_parts(embedded, False, "cpu", selection)
    for part in parts.values():
        part()
    assert len(parts) == 5


def test_the_table_has_every_part_and_what_failed(benchmark):
    figures = {"load": 1.5, "cold start": 2.0, "bytes": 3e9}
    figures["parts"] = {"UNet": {"p50": 0.01, "p99": 0.02}, "picture": {"p50": 1, "p99": 2}}
    text = benchmark.text_of({"a": figures, "b": {"failed": "ended with 1"}})
    assert "| UNet | 10.0 (20.0) |" in text and "b: ended with 1" in text
    assert list(benchmark.claims_of("L4", {"a": figures})) == ["L4, picture, a"]


def test_the_plot_has_every_engine_and_part(benchmark, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    parts = {"UNet 64x64, 2 rows": {"p50": 0.01}, "picture 64x64, 20 steps": {"p50": 0.3}}
    actual = {
        "a": {"parts": parts},
        "b": {"parts": dict([*parts.items()][:1])},
        "c": {"failed": "x"},
    }
    benchmark.draw(actual, "L4", tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for said in ("L4", "UNet 64x64, 2 rows", "picture 64x64, 20 steps"):
        assert said in text
