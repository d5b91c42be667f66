"""Graphs rewritten for TensorRT before 10.14 compute what they did before, in ONNX Runtime, and
TensorRT for RTX parses and builds them. TensorRT 10.3 itself has not read one.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from component_graphs import cast_inputs, exported, unet_inputs
from onnx import TensorProto, helper
from unet_configs import FAMILIES, THREE

from sdrt.bundle import open_bundle
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.engine.onnxruntime.session import create_session, session_options
from sdrt.engine.parity import sample_input
from sdrt.engine.plans import PlanKey
from sdrt.engine.tensorrt import builder as tensorrt_builder
from sdrt.engine.tensorrt import opset20
from sdrt.engine.tensorrt.opset20 import opset20_graph
from sdrt.engine.tensorrt.plans import PlanOptions, get_plan
from sdrt.engine.tensorrt.variants import RTX, Features
from sdrt.errors import BackendError
from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig

pytestmark = pytest.mark.integration

# Of those that the parser of TensorRT 10.1 lists as supported (onnx-tensorrt, docs/operators.md),
# the ones that Stable Diffusion's graphs have.
PARSED = {
    *("Add", "And", "ArgMax", "AveragePool", "Cast", "Clip", "Concat", "Constant"),
    *("ConstantOfShape", "Conv", "Cos", "CumSum", "Div", "Equal", "Exp", "Expand", "Gather"),
    *("GatherND", "Gelu", "Gemm", "Greater", "InstanceNormalization", "LayerNormalization"),
    *("LeakyRelu", "Less", "LessOrEqual", "MatMul", "Mul", "Pad", "Range", "ReduceMean", "Relu"),
    *("Reshape", "Resize", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt"),
    *("Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where"),
}
OLD = Features(attention=False, asks_capturable=True)


def operators(content):
    return {node.op_type for node in onnx.load_from_string(content).graph.node}


def outputs_of(graph, feeds, content=None):
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = create_session("graph", graph, options, "CPUExecutionProvider", {}, content)
    return session.run(None, feeds)


def difference(expected, actual):
    pairs = zip(expected, actual, strict=True)
    return max(
        float(np.abs(a.astype(float) - b).max() / np.abs(a.astype(float)).max()) for a, b in pairs
    )


def check(graph, feeds, limit):
    content = opset20_graph(graph)
    model = onnx.load_from_string(content)
    assert [(of.domain, of.version) for of in model.opset_import] == [("", 20)]
    assert operators(content) <= PARSED, operators(content) - PARSED
    assert difference(outputs_of(graph, feeds), outputs_of(graph, feeds, content)) < limit
    return content


def feeds_of(bundle, inputs, rows=2):
    lengths = axis_lengths(bundle.manifest, bundle.manifest.sizes[0], rows)
    return {s.name: sample_input(s.dtype, spec_shape(s, lengths)) for s in inputs}


def check_bundle(folder):
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    for name, component in manifest.components.items():
        feeds = feeds_of(bundle, component.inputs)
        check(bundle.graph(name), feeds, 1e-2 if component.dtype == "float16" else 1e-5)
    return set(manifest.components)


def test_the_embedded_models_graphs_compute_the_same(shapes):
    names = check_bundle(shapes)
    assert {"text_encoder", "unet", "vae_decoder", "vae_encoder"} <= names


@pytest.mark.rest
def test_a_checkpoints_graphs_compute_the_same(tiny_bundle):
    check_bundle(tiny_bundle)


@pytest.mark.rest
def test_the_graphs_of_xl_compute_the_same(tiny_xl_bundle):
    assert "text_encoder_2" in check_bundle(tiny_xl_bundle)


def exported_unet(folder, overrides, dtype):
    """A small UNet's graph, and inputs for it."""
    config = UnetConfig.from_json({**THREE, **overrides})
    inputs = unet_inputs(config)
    graph = exported(folder, "unet", Unet(config), inputs, dtype)
    return graph, {k: v.numpy() for k, v in cast_inputs(inputs, dtype).items()}


@pytest.mark.build
@pytest.mark.parametrize(
    "family",
    ["1.x", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "1.x")],
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_every_family_of_unets_computes_the_same(family, dtype, limit, tmp_path):
    graph, feeds = exported_unet(tmp_path, FAMILIES[family], dtype)
    content = check(graph, feeds, limit)
    nodes = onnx.load_from_string(content).graph.node
    counts = [sum(node.op_type == kind for node in nodes) for kind in ("Softmax", "MatMul")]
    assert counts[0] > 0 and counts[1] >= 2 * counts[0]


@pytest.mark.slow
def test_tensorrt_for_rtx_builds_a_rewritten_unet(tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    monkeypatch.setattr(tensorrt_builder, "get_features", lambda _: OLD)
    graph, feeds = exported_unet(tmp_path, {}, torch.float16)
    profile = {k: tuple((n, *v.shape[1:]) for n in (1, 2, 8)) for k, v in feeds.items()}
    marks = {"level": 3, "workspace": 0, "stripped": False, "graph": "", "weights": ""}
    key = PlanKey("unet", RTX, "1", ("sm_89",), "", "", (profile,), **marks, user_allocation=True)
    tensorrt_builder.build_plan(key, graph, tmp_path / "plan")
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert (tmp_path / "plan").stat().st_size > weights


@pytest.mark.trt
def test_plans_of_rewritten_graphs_are_other_plans(shapes, monkeypatch, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    bundle = open_bundle(shutil.copytree(shapes, tmp_path / "b"))
    options = PlanOptions(("sm_89",))
    usual = get_plan(bundle, "vae_decoder", RTX, None, options)
    monkeypatch.setattr(tensorrt_builder, "get_features", lambda _: OLD)
    rewritten = get_plan(bundle, "vae_decoder", RTX, None, options)
    assert rewritten.key.graph != usual.key.graph and rewritten.path != usual.path
    assert get_plan(bundle, "vae_decoder", RTX, None, options) == rewritten
    assert rewritten.size > 0.9 * usual.size


def test_operators_that_are_passed_on_gained_types_alone():
    def signature(schema):
        attributes = {
            name: (of.type.name, of.required, str(of.default_value))
            for name, of in schema.attributes.items()
        }
        values = [(v.name, v.option.name) for v in (*schema.inputs, *schema.outputs)]
        return values, attributes

    for name in opset20.SAME_OPERATORS:
        old, new = (onnx.defs.get_schema(name, opset) for opset in (20, 23))
        assert signature(old) == signature(new) and new.since_version > 20, name


def written(path, *nodes, opset=23, width=4, **options):
    """A graph of attention-like nodes over Q, K, V [1, 2, 3, width], and a mask."""
    value = helper.make_tensor_value_info
    values = [value(name, TensorProto.FLOAT, [1, 2, 3, width]) for name in "qkv"]
    mask = value("mask", options.get("mask", TensorProto.BOOL), [1, 1, 3, 3])
    out = value("out", TensorProto.FLOAT, [1, 2, 3, width])
    graph = helper.make_graph(nodes, "g", [*values, mask], [out])
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return Path(path)


@pytest.mark.parametrize("mask", [TensorProto.BOOL, TensorProto.FLOAT])
def test_masks_are_truth_values_or_added(mask, tmp_path):
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["out"], name="n", scale=0.3)
    graph = written(tmp_path / "model.onnx", node, mask=mask)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((1, 2, 3, 4), np.float32) for name in "qkv"}
    allowed = np.tril(np.ones((1, 1, 3, 3), bool))
    values = np.where(allowed, rng.standard_normal(allowed.shape), -1e9).astype(np.float32)
    check(graph, {**feeds, "mask": allowed if mask == TensorProto.BOOL else values}, 1e-6)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "said"),
    [
        ("Attention", "qkv", {"is_causal": 1}, "is_causal"),
        ("Attention", "qkv", {"softcap": 5.0}, "softcap"),
        ("RMSNormalization", "qk", {}, "newer"),
    ],
)
def test_what_opset_20_cannot_say_is_refused_by_name(operator, inputs, attributes, said, tmp_path):
    node = helper.make_node(operator, list(inputs), ["out"], name="the_node", **attributes)
    graph = written(tmp_path / "model.onnx", node)
    with pytest.raises(BackendError, match=rf"the_node \({operator}\).*{said}") as caught:
        opset20_graph(graph)
    assert "10.14" in caught.value.hint
