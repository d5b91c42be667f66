"""The torch backend with CUDA graphs, on a stand-in that runs on the CPU."""

import numpy as np
import pytest
import torch
from fake_cuda_graph import fake_cuda_graphs

from sdrt.bundle import open_bundle
from sdrt.bundle.safetensors import Tensors
from sdrt.engine.load_options import LoadOptions
from sdrt.engine.parity import sample_input
from sdrt.engine.selection import list_backends, select_backend
from sdrt.engine.torch import engine as torch_engine
from sdrt.engine.torch.engine import TorchEngine
from sdrt.errors import UsageError

NAME = "vae_decoder"


@pytest.fixture(scope="module")
def bundle(shapes):
    return open_bundle(shapes)


def loaded(bundle, **options):
    component = bundle.manifest.components[NAME]
    return TorchEngine(NAME, bundle.graph(NAME), component, "cpu", **options)


def feeds_of(side, seed=0):
    rng = np.random.default_rng(seed)
    return {"latents": rng.normal(size=(1, 4, side, 4)).astype(np.float32)}


def test_a_replay_computes_what_the_nodes_do_without_running_them(bundle, monkeypatch):
    captured = fake_cuda_graphs(monkeypatch)
    plain, graphed = loaded(bundle), loaded(bundle, cuda_graphs=True)
    graphed(feeds_of(4))
    monkeypatch.setattr(graphed, "_one_by_one", lambda *_, **__: pytest.fail("nodes ran"))
    for seed in (1, 2):
        actual = graphed(feeds_of(4, seed))["image"]
        assert np.array_equal(actual, plain(feeds_of(4, seed))["image"])
    assert [graph.replays for graph in captured] == [2]


def test_other_weights_are_captured_again(bundle, monkeypatch):
    captured = fake_cuda_graphs(monkeypatch)
    graphed = loaded(bundle, cuda_graphs=True)
    before = [graphed(feeds_of(4))["image"].copy() for _ in range(2)][1]
    name = "decoder.conv_out.weight"
    weights = Tensors(bundle.folder / NAME / "model.safetensors")[name]
    graphed.refit({name: 2 * weights})
    assert not np.array_equal(graphed(feeds_of(4))["image"], before)
    graphed.refit({})
    for _ in range(2):
        assert np.array_equal(graphed(feeds_of(4))["image"], before)
    assert [graph.replays for graph in captured] == [1, 0, 1]


def test_the_shape_used_least_recently_is_evicted(bundle, monkeypatch):
    captured = fake_cuda_graphs(monkeypatch)
    monkeypatch.setattr(torch_engine, "MAX_SHAPES", 2)
    graphed = loaded(bundle, cuda_graphs=True)
    for side in (2, 3, 2, 4, 2, 3):
        graphed(feeds_of(side))
    assert [graph.replays for graph in captured] == [2, 0, 0, 0]


def test_what_cannot_be_captured_runs_without_a_graph_and_a_warning(bundle, monkeypatch, caplog):
    captured = fake_cuda_graphs(monkeypatch)

    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nadvice")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    plain, graphed = loaded(bundle), loaded(bundle, cuda_graphs=True)
    for seed in (1, 2):
        actual = graphed(feeds_of(4, seed))["image"]
        assert np.array_equal(actual, plain(feeds_of(4, seed))["image"])
    (warning,) = caplog.records
    assert warning.message.endswith("operation not permitted when stream is capturing")
    assert not captured


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_other_backends_have_no_such_option(backend):
    with pytest.raises(UsageError) as caught:
        select_backend(backend, options=LoadOptions(torch_cuda_graphs=True))
    assert "--backend torch --cuda-graphs" in caught.value.hint


def test_the_cpu_has_none():
    every = list_backends(LoadOptions(torch_cuda_graphs=True))
    (cpu,) = [c for c in every if c.title == "torch on cpu"]
    assert cpu.unavailable_reason == "CUDA graphs need a GPU"


def test_compiled_and_captured_go_together(bundle, monkeypatch):
    """What is compiled is a function like any other here: the graph holds what it calls."""
    captured = fake_cuda_graphs(monkeypatch)
    monkeypatch.setattr(torch_engine, "compiled", eagerly)
    plain, graphed = loaded(bundle), loaded(bundle, compile=True, cuda_graphs=True)
    feeds = {"latents": sample_input("float32", (1, 4, 4, 4))}
    expected = plain(feeds)["image"]
    for _ in range(3):
        assert np.abs(graphed(feeds)["image"] - expected).max() < 1e-5
    assert [graph.replays for graph in captured] == [2]


def eagerly(steps, names, outputs):
    from unittest import mock

    from sdrt.engine.torch import compile as module

    with mock.patch.object(torch, "compile", lambda function, **_: function):
        return module.compiled(steps, names, outputs)
