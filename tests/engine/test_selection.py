"""Which backend is selected, why, and what happens when it fails to load."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from plan_examples import BOTH, L4

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.integrity import hash_file
from sdrt.cli.main import main
from sdrt.engine import LoadOptions, list_backends, select_backend
from sdrt.engine.gpu import NO_DEVICE, GpuInventory, explain_no_gpu
from sdrt.engine.onnxruntime.cpu import OrtEngine
from sdrt.engine.onnxruntime.cuda import MAX_SHAPES, OrtCudaEngine, OrtCudaOptions, OrtDevice
from sdrt.errors import BackendError, UsageError

LARGE = 2_000_000_000
NONE = GpuInventory(unavailable_reason="no NVIDIA GPU on this machine")


def reasons(gpus, device=0):
    return {c.title: c.unavailable_reason for c in list_backends(LoadOptions(device), gpus)}


def test_tensorrt_for_rtx_is_chosen_on_a_gpu_that_it_serves():
    pytest.importorskip("tensorrt_rtx")
    chosen = select_backend("auto", LARGE, gpus=GpuInventory((L4,), (13, 0), "580.1"))
    assert chosen.title == "tensorrt-rtx on cuda"
    ((title, reason),) = chosen.skipped
    assert title == "tensorrt on cuda" and "tensorrt is not installed" in reason


def test_every_skipped_backend_has_its_reason():
    """What this machine lacks is really lacking; what the GPU lacks is in its description."""
    pytest.importorskip("tensorrt_rtx")
    said = reasons(BOTH, device=1)
    assert "NVIDIA H100 is sm_90" in said["tensorrt-rtx on cuda:1"]
    assert "pip install" in said["tensorrt on cuda:1"]
    assert "CUDAExecutionProvider" in said["onnxruntime on cuda:1"]
    assert "finds no GPU" in said["torch on cuda:1"]
    chosen = select_backend("auto", LARGE, LoadOptions(1), gpus=BOTH)
    assert chosen.title == "openvino on cpu"
    for title, reason in said.items():
        if title.endswith("cuda:1"):
            assert (title, reason) in chosen.skipped
    old = replace(BOTH, cuda_version=(12, 4), driver_version="550.54")
    assert "driver 550.54 serves CUDA 12.4" in reasons(old)["tensorrt-rtx on cuda"]


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_that_was_requested_is_not_replaced(backend):
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        select_backend(backend, gpus=NONE)


def test_a_callers_stream_is_only_for_backends_that_can_use_one():
    pytest.importorskip("tensorrt_rtx")
    with_stream = LoadOptions(cuda_stream=1)
    chosen = select_backend("auto", LARGE, with_stream, gpus=GpuInventory((L4,), (13, 0), "580.1"))
    assert chosen.title == "tensorrt-rtx on cuda"
    with pytest.raises(BackendError, match=r"openvino on cpu.*: it cannot run in the caller's"):
        select_backend("auto", LARGE, with_stream, gpus=NONE)
    device = OrtDevice(0, stream=77)
    assert OrtCudaOptions().provider_options(device)["user_compute_stream"] == "77"


def test_a_hidden_gpu_is_distinguished_from_none():
    hidden = GpuInventory(unavailable_reason=explain_no_gpu(NO_DEVICE, ""))
    skipped = dict(select_backend("auto", LARGE, gpus=hidden).skipped)
    assert "unset it" in skipped["tensorrt on cuda"]


def test_an_unknown_device_is_refused():
    with pytest.raises(UsageError, match="no GPU 2; available: 0 NVIDIA L4, 1 NVIDIA H100"):
        select_backend(options=LoadOptions(2), gpus=BOTH)
    with pytest.raises(UsageError, match="no GPU -1"):
        select_backend(options=LoadOptions(-1), gpus=BOTH)
    with pytest.raises(UsageError, match="no NVIDIA GPU"):
        select_backend(options=LoadOptions(1), gpus=NONE)


def test_a_backend_that_failed_is_not_chosen_again():
    chosen = select_backend("auto", 0, gpus=NONE, failed={"onnxruntime on cpu": "it is broken"})
    assert chosen.title == "torch on cpu"
    assert ("onnxruntime on cpu", "it is broken") in chosen.skipped
    with pytest.raises(BackendError, match="it is broken"):
        select_backend("onnxruntime", 0, gpus=NONE, failed={"onnxruntime on cpu": "it is broken"})


@pytest.fixture(scope="module")
def refused_by_onnxruntime(tiny_bundle, tmp_path_factory):
    """A bundle whose UNet is of a later format than ONNX Runtime reads; torch does not mind."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("opset") / "tiny")
    graph = folder / "unet" / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    model.ir_version = 99
    graph.write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "sdrt.json").read_text())
    size = graph.stat().st_size
    manifest["files"]["unet/model.onnx"] = {"size": size, "sha256": hash_file(graph)}
    (folder / "sdrt.json").write_text(json.dumps(manifest))
    return folder, tiny_bundle


def test_a_backend_that_fails_to_load_is_skipped_with_a_warning(refused_by_onnxruntime, caplog):
    broken, intact = refused_by_onnxruntime
    options = {"prompt": "a circle", "num_inference_steps": 2, "seed": 0}
    with caplog.at_level("INFO", logger="sdrt"), sdrt.load(broken) as pipe:
        assert pipe.backend == "torch on cpu"
        actual = np.asarray(pipe(**options).images[0], np.int16)
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert any(w.startswith("ONNX Runtime (CPU) failed to load") for w in warned)
    used = [r.message for r in caplog.records if " · " in r.message]
    assert used == [
        f"{pipe.manifest.name} · fp32 · {label}"
        for label in ("ONNX Runtime (CPU)", "PyTorch (CPU)")
    ]
    with sdrt.load(intact, backend="onnxruntime") as pipe:
        expected = np.asarray(pipe(**options).images[0], np.int16)
    assert np.abs(actual - expected).max() <= 1
    with pytest.raises(BackendError, match="failed to load"):
        sdrt.load(broken, backend="onnxruntime")


def test_doctor_lists_backends_and_the_one_that_would_be_selected(capsys):
    assert main(["doctor", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["chosen"] == select_backend().title
    assert bool(actual["gpus"]) == (actual["no_gpu"] is None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"default backend for large models: {actual['chosen']}" in text
    assert "tensorrt-rtx  cuda" in text


def test_hidden_gpus_are_reported():
    """On a machine with a GPU this says that it is hidden, elsewhere that there is none."""
    code = "from sdrt.engine.gpu import detect_gpus; print(detect_gpus().unavailable_reason)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "no NVIDIA GPU" in done.stdout or "CUDA_VISIBLE_DEVICES" in done.stdout


def test_the_onnx_runtime_cuda_options_are_parsed_and_checked():
    options = OrtCudaOptions.from_text("tf32=1,conv_search=EXHAUSTIVE,graphs=0")
    assert options == OrtCudaOptions(tf32=True, conv_search="EXHAUSTIVE", graphs=False)
    settings = options.provider_options(OrtDevice(1))
    assert settings["device_id"] == "1" and settings["enable_cuda_graph"] == "0"
    for text in ("tf32=2", "speed=1", "conv_search=FAST", "tf32"):
        with pytest.raises(UsageError, match="SDRT_ORT_CUDA"):
            OrtCudaOptions.from_text(text)


def test_the_cuda_engines_binding_computes_the_same_on_the_cpu(refused_by_onnxruntime):
    """Without a GPU it still shows that buffers are cached, filled and evicted correctly."""
    bundle = open_bundle(refused_by_onnxruntime[1])
    component, graph = bundle.manifest.components["unet"], bundle.graph("unet")
    exact = OrtEngine("unet", graph, component)
    bound = OrtCudaEngine("unet", graph, component, OrtDevice(kind="cpu"))
    rng = np.random.default_rng(0)
    for side in (4, 6, 4, *range(2, 4 + 2 * MAX_SHAPES, 2), 4):
        feeds = {
            "sample": rng.normal(size=(2, 4, side, 4)).astype(np.float32),
            "timestep": rng.uniform(0, 999, 2).astype(np.float32),
            "context": rng.normal(size=(2, 32, 16)).astype(np.float32),
        }
        expected = exact(feeds)["output"].copy()
        assert np.array_equal(bound(feeds)["output"], expected)
    assert len(bound._bound) == MAX_SHAPES
    bound.close()
    with pytest.raises(BackendError, match="closed"):
        bound(feeds)


def test_doctor_explains_a_machine_where_no_backend_works():
    """Packages are missing, as on a machine that has only what sdrt itself requires."""
    code = """
import importlib.util, sys
from sdrt.cli.main import main
found, absent = importlib.util.find_spec, ("onnxruntime", "openvino", "torch", "tensorrt_rtx")
importlib.util.find_spec = lambda name, *rest: None if name in absent else found(name, *rest)
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime is not installed" in done.stdout and "none works" in done.stdout
