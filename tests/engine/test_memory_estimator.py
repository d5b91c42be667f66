"""Images that have no room in memory are refused before anything runs."""

import subprocess
import sys

import pytest

from sdrt import process_stats
from sdrt.bundle import open_bundle
from sdrt.cli.main import main
from sdrt.engine import memory_budget
from sdrt.engine.memory_estimator import MemoryEstimator, attention_shapes
from sdrt.errors import UsageError
from sdrt.runtime.batching.engine import InflightBatcher

pytestmark = pytest.mark.integration

PROMPT = "a red circle"
HUGE = "4096x4096"
GB = 10**9
# One call of the UNet in a process of its own; prints the bytes that it adds at its peak.
CALL = """
import sys, sdrt
from sdrt.runtime.batching.cost_model import zero_inputs
from sdrt.process_stats import forget_peak, peak_bytes, resident_bytes
pipe = sdrt.load(sys.argv[1], backend=sys.argv[2])
unet, tokens = pipe.engines["unet"], pipe.manifest.max_tokens
unet(zero_inputs(unet, 2, (8, 8), tokens))
base = resident_bytes()
forget_peak()
unet(zero_inputs(unet, 2, (int(sys.argv[3]) // 8,) * 2, tokens))
print(peak_bytes() - base, int(bool(pipe.precision)))
"""


def room(shapes, backend="onnxruntime on cpu", reduced_precision=False):
    return MemoryEstimator(open_bundle(shapes), None, backend, 0, reduced_precision)


def test_heads_and_tokens_are_those_of_the_graph(shapes):
    onnx = pytest.importorskip("onnx")
    path = open_bundle(shapes).graph("unet")
    nodes = onnx.load(path, load_external_data=False).graph.node
    actual = list(attention_shapes(path))
    assert len(actual) == sum(node.op_type == "Attention" for node in nodes) > 0
    assert {heads for heads, _, _ in actual} == {5}


def test_scores_grow_with_the_fourth_power_of_the_side(shapes):
    own = room(shapes)
    scores = [
        own.required_bytes((side, side), 2, keeps_scores=True)
        - own.required_bytes((side, side), 2, False)
        for side in (512, 1024)
    ]
    assert scores[0] == 2 * 5 * (64 * 64) ** 2 * 4 and scores[1] == 16 * scores[0]
    wide = own.required_bytes((1024, 512), 2, True) - own.required_bytes((1024, 512), 2, False)
    assert wide == 4 * scores[0]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_estimate_is_what_a_call_takes(shapes, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    command = [sys.executable, "-c", CALL, str(shapes), backend, "512"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    keeps = backend == "onnxruntime"
    taken, reduced = map(int, done.stdout.split())
    estimator = room(shapes, f"{backend} on cpu", bool(reduced))
    assert taken == pytest.approx(estimator.required_bytes((512, 512), 2, keeps), rel=0.35)


def test_the_command_says_the_bytes_in_a_sentence(shapes, capfd):
    assert main(["run", PROMPT, "--size", HUGE, "--backend", "onnxruntime", "-q"]) == 2
    error, hint = capfd.readouterr().err.splitlines()
    assert "4096x4096 needs about 2,7" in error and "GB are free" in error
    assert hint == "hint: choose a smaller size"


def test_python_and_in_flight_refuse_it_too(pipe):
    for call in (lambda: pipe(PROMPT, size=HUGE), lambda: pipe.steps(PROMPT, size=HUGE)):
        with pytest.raises(UsageError, match="4096x4096 needs about"):
            call()
    with InflightBatcher(pipe) as engine, pytest.raises(UsageError, match="4096x4096 needs about"):
        engine.submit(PROMPT, {"size": HUGE})


def test_fewer_images_are_made_together_where_memory_is_short(shapes, monkeypatch):
    own = room(shapes)
    needed = [own.required_bytes((512, 512), 2 * count, True) for count in (1, 2, 3)]
    for free, count in ((needed[2], 3), (needed[1], 2), (needed[2] - 1, 2), (needed[0], 1)):
        monkeypatch.setattr(MemoryEstimator, "free_bytes", lambda self, free=free: free)
        assert own.max_images((512, 512), 2, 4, keeps_scores=True) == count
    monkeypatch.setattr(MemoryEstimator, "free_bytes", lambda self: needed[0] - 1)
    with pytest.raises(UsageError, match="512x512 needs about"):
        own.max_images((512, 512), 2, 4, keeps_scores=True)
    monkeypatch.setattr(MemoryEstimator, "free_bytes", lambda self: None)
    assert own.max_images((8192, 8192), 2, 4, keeps_scores=True) == 4


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_bound_counts_without_files_that_can_be_dropped(
    tmp_path, monkeypatch, version
):
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    maximum, used, cached = names[version]
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    for name, text in ((maximum, "1000000"), (used, "900000"), ("memory.stat", f"{cached} 600000")):
        (folder / name).write_text(text)
    monkeypatch.setattr(process_stats, "CGROUPS", tmp_path)
    assert process_stats.available_bytes() == memory_budget.free_bytes(None) == 700_000
    (folder / maximum).write_text("max")
    assert process_stats.available_bytes() > 700_000
