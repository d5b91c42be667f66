"""ONNX Runtime's fused operators in place of the graph's own: attention run for real on the CPU,
where it has a kernel, group normalisation by torch, since ONNX Runtime has one for GPUs only.
"""

import json
import logging
import shutil

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from sdrt.bundle import open_bundle
from sdrt.engine.gpu import Gpu
from sdrt.engine.onnxruntime.cpu import OrtEngine
from sdrt.engine.onnxruntime.cuda import load_engine
from sdrt.engine.onnxruntime.fusion import write_fused_graph
from sdrt.engine.onnxruntime.session import create_session, session_options
from sdrt.engine.parity import sample_input
from sdrt.engine.torch import engine as torch_engine
from sdrt.engine.torch import ops
from sdrt.errors import BackendError

pytestmark = pytest.mark.integration

GPU = Gpu(0, "NVIDIA L4", "sm_89", 24 << 30)
LENGTHS = {"rows": 2, "tokens": 32, "latent_height": 8, "latent_width": 12}
FUSED = {"unet": (8, 11), "vae_decoder": (1, 22)}  # 10 of the UNet have an odd number in a group
OUTPUTS = {"unet": "output", "vae_decoder": "image"}


@pytest.fixture(scope="module")
def bundle(shapes, tmp_path_factory):
    folder, ignored = tmp_path_factory.mktemp("fused") / "b", shutil.ignore_patterns("plans")
    return open_bundle(shutil.copytree(shapes, folder, ignore=ignored))


def feeds_of(component):
    shapes = {s.name: tuple(LENGTHS.get(a, a) for a in s.shape) for s in component.inputs}
    return {s.name: sample_input(s.dtype, shapes[s.name]) for s in component.inputs}


def counted(path):
    nodes = onnx.load(path, load_external_data=False).graph.node
    return tuple(
        sum(node.op_type == kind for node in nodes) for kind in ("MultiHeadAttention", "GroupNorm")
    )


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_is_loaded_from_the_cache_and_computes_the_same(bundle, name, caplog):
    component = bundle.manifest.components[name]
    feeds = feeds_of(component)
    exact = OrtEngine(name, bundle.graph(name), component)
    expected = exact(feeds)[OUTPUTS[name]].copy()
    with caplog.at_level(logging.WARNING, logger="sdrt"):
        for _ in range(2):  # made, then found
            engine = load_engine(bundle, name, GPU, kind="cpu")
            actual = engine(feeds)[OUTPUTS[name]]
            assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
            engine.close()
    assert not caplog.records
    (plan,) = bundle.folder.glob(f"plans/nvidia-l4-sm_89-ort*/{name}-*.plan")
    assert counted(plan)[0] == FUSED[name][0] and plan.stat().st_size < 2e6
    assert json.loads(plan.with_suffix(".json").read_text())["parity"]["cosine"] > 0.9999


def test_control_inputs_leave_attention_fused(bundle, tmp_path):
    write_fused_graph(bundle.graph("unet_control"), tmp_path / "fused.onnx")
    assert counted(tmp_path / "fused.onnx") == FUSED["unet"]


def test_other_weights_are_for_fused_graphs_too(bundle):
    component = bundle.manifest.components["unet"]
    feeds = feeds_of(component)
    engine = load_engine(bundle, "unet", GPU, kind="cpu")
    before = engine(feeds)["output"].copy()
    from sdrt.bundle.safetensors import Tensors

    name = "conv_out.weight"
    weights = Tensors(bundle.folder / "unet" / "model.safetensors")[name]
    engine.refit({name: 2 * weights})
    assert np.abs(engine(feeds)["output"] - before).max() > 0.1
    engine.refit({})
    assert np.array_equal(engine(feeds)["output"], before)
    engine.close()


def test_what_computes_something_else_is_left_with_a_warning(bundle, monkeypatch, caplog):
    monkeypatch.setattr(
        "sdrt.engine.parity.compare_with_cpu", lambda *_: {"cosine": 0.5, "error": 1.0}
    )
    engine = load_engine(bundle, "vae_encoder", GPU, kind="cpu")
    assert engine._derived is None and "without fused operators" in caplog.text
    engine.close()


def group_norm(inputs, attributes):
    """`com.microsoft.GroupNorm` as ONNX Runtime documents it."""
    assert attributes["channels_last"] == 1
    x, scale, bias = inputs
    assert scale.dtype == torch.float32
    first = x.permute(0, 3, 1, 2)
    created = F.group_norm(first, attributes["groups"], scale, bias, attributes["epsilon"])
    created = F.silu(created) if attributes["activation"] else created
    return created.permute(0, 2, 3, 1)


def attention(inputs, attributes):
    """`com.microsoft.MultiHeadAttention`."""
    heads = [x.reshape(*x.shape[:2], attributes["num_heads"], -1).transpose(1, 2) for x in inputs]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", FUSED)
def test_fused_norms_by_torch_compute_the_same(bundle, name, monkeypatch):
    monkeypatch.setitem(ops.OPERATIONS, "GroupNorm", group_norm)
    monkeypatch.setitem(ops.OPERATIONS, "MultiHeadAttention", attention)
    component = bundle.manifest.components[name]
    graph = bundle.graph(name).with_name("fused.onnx")
    write_fused_graph(bundle.graph(name), graph)
    assert counted(graph) == FUSED[name]
    loaded = onnx.load(graph, load_external_data=False).graph
    widths = {tensor.name: tensor.dims[0] for tensor in loaded.initializer if tensor.dims}
    sources = {out: node.input[0] for node in loaded.node for out in node.output}
    for node in loaded.node:
        if node.op_type == "GroupNorm":
            (groups,) = [a.i for a in node.attribute if a.name == "groups"]
            assert widths[sources[node.input[1]]] % (2 * groups) == 0
    feeds = feeds_of(component)
    graphs = bundle.graph(name), graph
    plain, fused = (torch_engine.TorchEngine(name, item, component, "cpu") for item in graphs)
    expected, actual = (engine(feeds)[OUTPUTS[name]] for engine in (plain, fused))
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    # Its types and attributes are those that ONNX Runtime knows: only a kernel is missing here.
    with pytest.raises(BackendError, match="Could not find an implementation for GroupNorm"):
        create_session(name, graph, session_options(), "CPUExecutionProvider", {})
    graph.unlink()
