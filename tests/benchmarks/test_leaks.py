"""Images, pipelines and LoRA files leave nothing behind: benchmarks/leaks.py in short."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.integration

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def leaks():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("leaks", BENCHMARKS / "leaks.py")
        module = sys.modules["leaks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.SAMPLES = 30
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.rest
def test_files_and_threads_are_flat(leaks, shapes):
    args = leaks.argparse.Namespace(
        bundle=shapes, backend="onnxruntime", images=60, cycles=12, switches=12
    )
    for name, actual in leaks.measured(args).items():
        assert actual.files[0] == actual.files[1], name
        assert actual.threads[0] == actual.threads[1], name


def test_a_leak_is_found(leaks, tmp_path):
    held, files = [], []
    actual = leaks.growth(30, lambda i: held.append(bytearray(b"x") * 100_000))
    assert actual.leaks
    assert actual.bytes == pytest.approx(100_000, rel=0.2)
    actual = leaks.growth(12, lambda i: files.append((tmp_path / str(i)).open("w")))
    assert actual.leaks
    assert actual.files[1] > actual.files[0]
    for file in files:
        file.close()
    assert leaks.growth(12, lambda i: bytearray(100_000)).bytes < 50_000


def test_the_interval_is_that_of_ten_means(leaks):
    rng = np.random.default_rng(0)
    at = np.arange(1000.0)
    slope, within = leaks.line_through(at, 7.0 * at + rng.normal(0.0, 100.0, 1000))
    assert abs(slope - 7.0) < within < 0.2
