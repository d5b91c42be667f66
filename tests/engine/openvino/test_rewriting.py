"""What is rewritten for OpenVINO computes the same with fewer operations."""

from collections import Counter

import numpy as np
import pytest

from sdrt.bundle import open_bundle
from sdrt.engine.parity import sample_input

pytestmark = pytest.mark.integration

ov = pytest.importorskip("openvino")
operations = pytest.importorskip("openvino.opset13")

LENGTHS = {"rows": 2, "tokens": 32, "latent_height": 8, "latent_width": 12}


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_a_rewritten_model_computes_the_same(shapes, name):
    from sdrt.engine.openvino.rewriting import rewrite

    bundle = open_bundle(shapes)
    core, graph = ov.Core(), str(bundle.graph(name))
    plain, rewritten = core.read_model(graph), core.read_model(graph)
    rewrite(rewritten, {})
    specs = bundle.manifest.components[name].inputs
    lengths = [tuple(LENGTHS.get(axis, axis) for axis in spec.shape) for spec in specs]
    feeds = {
        spec.name: sample_input(spec.dtype, shape)
        for spec, shape in zip(specs, lengths, strict=True)
    }
    expected, actual = (infer(core, model, feeds) for model in (plain, rewritten))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_a_rewritten_unet_splits_nothing_and_computes_few_shapes(shapes):
    from sdrt.engine.openvino.rewriting import rewrite

    graph = str(open_bundle(shapes).graph("unet"))
    plain, rewritten = ov.Core().read_model(graph), ov.Core().read_model(graph)
    rewrite(rewritten, {})
    before, after = map(kinds, (plain, rewritten))
    assert before["Split"] and before["GroupNormalization"]
    assert not after["Split"] and not after["GroupNormalization"]
    assert after["MatMul"] == before["MatMul"] + before["Split"]
    assert computed_reshapes(rewritten) < computed_reshapes(plain) / 5
    assert transposed_lines(plain) and not transposed_lines(rewritten)


def test_attention_of_a_wide_head_is_not_fused():
    from sdrt.engine.openvino.rewriting import rewrite

    model = attention(heads=1, width=256)
    rewrite(model, {})
    compiled = compile_model(ov.Core(), model)
    layers = {node.get_rt_info()["layerType"].astype(str) for node in compiled_nodes(compiled)}
    assert {"MatMul", "Softmax"} <= layers and "Subgraph" not in layers
    request = compiled.create_infer_request()
    for tokens in (1, 4, 81, 200):  # fewer than the parts, and such as they do not divide
        feeds = {name: sample_input("float32", (2, 1, tokens, 256)) for name in "qkv"}
        request.infer(feeds)
        actual = request.get_output_tensor(0).data
        q, k, v = (feeds[name].astype(np.float64) for name in "qkv")
        weights = np.exp(q @ k.transpose(0, 1, 3, 2) / 16.0)
        expected = weights / weights.sum(axis=-1, keepdims=True) @ v
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_attention_of_many_tokens_is_not_fused_for_one_size(monkeypatch):
    from sdrt.engine.openvino import rewriting

    monkeypatch.setattr(rewriting, "MANY_TOKENS", 48)
    feeds = {name: sample_input("float32", (2, 3, 50, 8)) for name in "qkv"}
    plain, rewritten = attention(3, 8), attention(3, 8)
    rewriting.rewrite(rewritten, {name: array.shape for name, array in feeds.items()})
    assert not kinds(rewritten)["ScaledDotProductAttention"]
    expected, actual = (infer(ov.Core(), model, feeds) for model in (plain, rewritten))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    short = {**feeds, "k": feeds["k"][:, :, :9], "v": feeds["v"][:, :, :9]}  # of a prompt
    rewriting.rewrite(plain, {name: array.shape for name, array in short.items()})
    assert kinds(plain)["ScaledDotProductAttention"] == 1


def test_other_attention_is_left_to_openvino():
    from sdrt.engine.openvino.rewriting import rewrite

    for heads, width in ((2, 256), (1, 64)):
        model = attention(heads, width)
        rewrite(model, {})
        assert kinds(model)["ScaledDotProductAttention"] == 1


def attention(heads, width):
    shape = ov.PartialShape([-1, heads, -1, width])
    inputs = [operations.parameter(shape, np.float32, name=name) for name in "qkv"]
    for name, node in zip("qkv", inputs, strict=True):
        node.output(0).set_names({name})
    return ov.Model([operations.scaled_dot_product_attention(*inputs)], inputs)


def infer(core, model, feeds):
    request = compile_model(core, model).create_infer_request()
    request.infer(feeds)
    return request.get_output_tensor(0).data.copy()


def compile_model(core, model):
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def compiled_nodes(compiled):
    return compiled.get_runtime_model().get_ops()


def kinds(model):
    return Counter(node.get_type_name() for node in model.get_ops())


def transposed_lines(model):
    """Transposes of tokens, [rows, tokens, channels], to lines of pixels, or back."""
    return sum(
        node.get_type_name() == "Transpose"
        and node.input_value(1).get_node().data.tolist() == [0, 2, 1]
        for node in model.get_ops()
    )


def computed_reshapes(model):
    """Reshapes of activations whose targets are computed from more than one shape."""
    return sum(
        node.get_type_name() == "Reshape"
        and node.input_value(1).get_node().get_type_name() not in ("Constant", "ShapeOf")
        and node.input_value(0).get_partial_shape().rank.get_length() > 1
        for node in model.get_ops()
    )
