"""ONNX Runtime on CUDA, as far as it goes without a GPU: the same bindings on the CPU, whose
provider ignores the ids of graphs. `test_cuda_provider.py` has the provider itself.
"""

import importlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest

from sdrt.bundle import open_bundle
from sdrt.bundle.safetensors import Tensors
from sdrt.engine.onnxruntime import cuda
from sdrt.engine.onnxruntime.cpu import OrtEngine
from sdrt.engine.onnxruntime.cuda import OrtCudaEngine, OrtDevice
from sdrt.engine.onnxruntime.cuda_libraries import preload_cuda_libraries
from sdrt.errors import BackendError

pytestmark = pytest.mark.integration
NAME = "vae_decoder"
SAID = "This session cannot use the graph capture feature as requested by the user"


@pytest.fixture(scope="module")
def bundle(shapes):
    return open_bundle(shapes)


def loaded(bundle, kind="cpu"):
    component = bundle.manifest.components[NAME]
    return OrtCudaEngine(NAME, bundle.graph(NAME), component, OrtDevice(kind=kind))


def feeds_of(side, seed=0):
    rng = np.random.default_rng(seed)
    return {"latents": rng.normal(size=(1, 4, side, 4)).astype(np.float32)}


@pytest.fixture
def expected(bundle):
    return OrtEngine(NAME, bundle.graph(NAME), bundle.manifest.components[NAME])


def test_calls_of_many_threads_run_in_one(bundle, expected, monkeypatch):
    engines, seen = [loaded(bundle) for _ in range(2)], set()
    run = OrtCudaEngine._run

    def watched(self, arrays):
        seen.add(threading.get_ident())
        return run(self, arrays)

    monkeypatch.setattr(OrtCudaEngine, "_run", watched)
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda i: engines[i % 2](feeds_of(4, i))["image"], range(12)))
    assert len(seen) == 1 and threading.get_ident() not in seen
    for i, image in enumerate(actual):
        assert np.array_equal(image, expected(feeds_of(4, i))["image"])


def test_a_session_that_captured_many_shapes_is_opened_again(bundle, expected, monkeypatch):
    monkeypatch.setattr(cuda, "MAX_GRAPHS", 3)
    opened = []
    create = cuda.create_session
    monkeypatch.setattr(cuda, "create_session", lambda *a, **k: opened.append(0) or create(*a, **k))
    engine = loaded(bundle)
    for side in (2, 3, 4, 2, 3, 4, 5, 6, 2):
        assert np.array_equal(engine(feeds_of(side))["image"], expected(feeds_of(side))["image"])
    assert len(opened) == 2


def test_a_graph_that_cuda_graphs_refuse_is_opened_without(bundle, monkeypatch, caplog):
    settings, ids = [], []
    create, run_options = cuda.create_session, cuda._run_options

    def refuse(name, graph, opened, provider, options):
        settings.append(options["enable_cuda_graph"])
        if settings[-1] == "1":
            raise BackendError(f"ONNX Runtime failed to load {graph}: {SAID}")
        return create(name, graph, opened, "CPUExecutionProvider", {})

    monkeypatch.setattr(cuda, "create_session", refuse)
    monkeypatch.setattr(cuda, "_run_options", lambda id: ids.append(id) or run_options(id))
    engine = loaded(bundle, kind="cuda")
    assert settings == ["1", "0"] and "without CUDA graphs" in caplog.text
    engine._device = OrtDevice(kind="cpu")
    engine(feeds_of(4))
    assert set(ids) == {-1}
    name = "decoder.conv_out.weight"
    weights = Tensors(bundle.folder / NAME / "model.safetensors")[name]
    engine._device = OrtDevice(kind="cuda")
    engine.refit({name: weights})
    assert settings == ["1", "0", "0"]  # not asked again


def test_other_errors_of_loading_are_not_tried_again(bundle, monkeypatch):
    tried = []

    def fail(*arguments, **_):
        tried.append(arguments)
        raise BackendError("ONNX Runtime fell back from CUDAExecutionProvider")

    monkeypatch.setattr(cuda, "create_session", fail)
    with pytest.raises(BackendError, match="fell back"):
        loaded(bundle, kind="cuda")
    assert len(tried) == 1


def test_no_call_meets_a_closed_engine_while_weights_change(bundle):
    engine = loaded(bundle)
    name = "decoder.conv_out.weight"
    weights = Tensors(bundle.folder / NAME / "model.safetensors")[name]
    stop = threading.Event()

    def call():
        while not stop.is_set():
            engine(feeds_of(2))

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call)
        for i in range(4):
            engine.refit({name: weights * np.float32(i + 2)})
        stop.set()
        calling.result()


def test_cuda_of_every_package_is_loaded_without_a_word_on_stdout(
    tmp_path, monkeypatch, capsys, caplog
):
    for folder in ("cu13", "cudnn"):
        (tmp_path / "nvidia" / folder / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    asked = []

    def preload(directory=None):
        asked.append(directory)
        sys.stdout.write(f"Failed to load libcublasLt.so.13 from {directory}\n")

    monkeypatch.setattr(ort, "preload_dlls", preload)
    preload_cuda_libraries()
    own = [place for place in asked if place and place.startswith(str(tmp_path))]
    assert own == [str(tmp_path / "nvidia" / name / "lib") for name in ("cu13", "cudnn")]
    assert asked[-1] is None and capsys.readouterr().out == ""
    assert [record.message for record in caplog.records] == [
        "ONNX Runtime: Failed to load libcublasLt.so.13 from None"
    ]
