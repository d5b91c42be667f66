"""The GPU benchmark without a GPU: it says so, and what it would time runs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from sdrt.engine.gpu import detect_gpus

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "gpu.py")
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


def test_every_engine_has_its_reason(benchmark):
    actual = benchmark.contestants()
    own = {"tensorrt", "tensorrt-rtx", "onnxruntime", benchmark.PLAIN, "torch"}
    assert {*benchmark.REFERENCES, *own} == set(actual)


def test_every_part_that_would_be_timed_runs(benchmark, pipe, monkeypatch):
    monkeypatch.setattr(benchmark, "ROWS", (1, 2))
    parts = benchmark.parts_of(pipe, ["64x64"], [1])
    for part in parts.values():
        assert part() is not None
    assert len(parts) == 6


@pytest.mark.rest
@pytest.mark.reference
def test_every_part_of_the_reference_runs(benchmark, embedded, monkeypatch):
    monkeypatch.setattr(benchmark, "ROWS", (1, 2))
    parts = benchmark.reference_parts(embedded, False, ["64x64"], [1], device="cpu")
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
