"""The UNet's graph without the work that no step changes, against the plain graph; the graphs of
that work against what diffusers computes on its way.
"""

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hoisted_graphs import PLAIN, derived_bundles, hoisted_graph

from sdrt.bundle.embedded import MODELS
from sdrt.engine import select_backend
from sdrt.engine.axes import axis_lengths, spec_shape

CONTEXT_KV, TIME_BIASES = hoisted_graph.CONTEXT_KV, hoisted_graph.TIME_BIASES
CONTEXT_GRAPH, TIME_GRAPH = hoisted_graph.CONTEXT_GRAPH, hoisted_graph.TIME_GRAPH
HOISTED_GRAPH = hoisted_graph.HOISTED_GRAPH


@pytest.fixture(
    scope="module", params=["shapes", pytest.param("tiny_xl_bundle", marks=pytest.mark.rest)]
)
def model(request, tmp_path_factory):
    """A checkpoint's folder, and its bundles by the UNet's graph."""
    source = request.getfixturevalue(request.param)
    is_shapes = request.param == "shapes"
    checkpoint = MODELS / "shapes" if is_shapes else request.getfixturevalue("tiny_xl")
    return checkpoint, derived_bundles(source, tmp_path_factory.mktemp("hoisted"))


def load(bundle, backend="onnxruntime"):
    return select_backend(backend).load(bundle, "unet")


def pick(feeds, engine):
    return {spec.name: feeds[spec.name] for spec in engine.inputs}


def feeds_for(bundle, rows=2, chunks=1):
    """Random inputs of the plain graph by name, each row of another timestep."""
    rng = np.random.default_rng(0)
    lengths = axis_lengths(bundle.manifest, (48, 32), rows)
    lengths["tokens"] *= chunks
    feeds = {
        spec.name: rng.normal(size=spec_shape(spec, lengths)).astype(np.float32)
        for spec in bundle.manifest.components["unet"].inputs
    }
    return {**feeds, "timestep": np.linspace(999.0, 1.0, rows, dtype=np.float32)}


def diffusers_outputs(checkpoint, feeds):
    """What diffusers' layers of keys and values and its residual blocks' projections of time put
    out in one evaluation, one after the other.
    """
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").float()
    outputs = {CONTEXT_KV: [], TIME_BIASES: []}
    for name, layer in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "time_emb_proj")):
            of = outputs[TIME_BIASES if name.endswith("proj") else CONTEXT_KV]
            layer.register_forward_hook(lambda _, __, output, of=of: of.append(output.numpy()))
    t = {name: torch.from_numpy(array) for name, array in feeds.items()}
    added = {"text_embeds": t["pooled"], "time_ids": t["time_ids"]} if "pooled" in t else None
    with torch.no_grad():
        unet(t["sample"], t["timestep"], t["context"], added_cond_kwargs=added)
    return {name: np.concatenate(arrays, axis=-1) for name, arrays in outputs.items()}


@pytest.mark.reference
def test_their_outputs_are_what_diffusers_layers_put_out(model):
    checkpoint, bundles = model
    feeds = feeds_for(bundles[PLAIN], rows=3)
    expected = diffusers_outputs(checkpoint, feeds)
    for file, name in ((CONTEXT_GRAPH, CONTEXT_KV), (TIME_GRAPH, TIME_BIASES)):
        engine = load(bundles[file])
        actual = engine(pick(feeds, engine))[name]
        assert actual.shape == expected[name].shape
        assert np.abs(actual - expected[name]).max() < 1e-5 * np.abs(expected[name]).max()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_the_output_is_the_plain_graphs(model, backend):
    _, bundles = model
    plain, hoisted, context, time = (
        load(bundles[file], backend) for file in (PLAIN, HOISTED_GRAPH, CONTEXT_GRAPH, TIME_GRAPH)
    )
    for rows, chunks in ((2, 1), (3, 2)):
        feeds = feeds_for(bundles[PLAIN], rows, chunks)
        once = {**context(pick(feeds, context)), **time(pick(feeds, time))}
        actual = hoisted(pick({**feeds, **once}, hoisted))["output"]
        expected = plain(pick(feeds, plain))["output"]
        assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_all_steps_in_one_batch_have_the_biases_of_each_alone(model):
    _, bundles = model
    time = load(bundles[TIME_GRAPH])
    steps = pick(feeds_for(bundles[PLAIN], rows=20), time)
    together = time(steps)[TIME_BIASES]
    for k in (0, 7, 19):
        alone = time({name: array[k : k + 1] for name, array in steps.items()})[TIME_BIASES]
        assert np.abs(together[k] - alone[0]).max() < 1e-5 * np.abs(together).max()


def test_every_weight_is_read_by_one_graph(model):
    _, bundles = model
    weights = {
        file: bundle.manifest.components["unet"].weights
        for file, bundle in bundles.items()
        if file != PLAIN
    }
    plain = ir.load(bundles[PLAIN].graph("unet")).graph.initializers.values()
    stored = [v.name for v in plain if isinstance(v.const_value, ir.ExternalTensor)]
    assert sorted(name for names in weights.values() for name in names) == sorted(stored)
    projections = ("attn2.to_k.weight.T", "attn2.to_v.weight.T")
    assert all(name.endswith(projections) for name in weights[CONTEXT_GRAPH])
    assert all("time_emb" in n or "add_emb" in n for n in weights[TIME_GRAPH])


def test_the_loop_reads_neither_prompt_nor_timestep(model):
    _, bundles = model
    inputs = bundles[HOISTED_GRAPH].manifest.components["unet"].inputs
    assert [spec.name for spec in inputs] == ["sample", CONTEXT_KV, TIME_BIASES]
    assert inputs[1].shape[:2] == ("rows", "tokens") and inputs[2].shape[:1] == ("rows",)


def test_a_unet_without_cross_attention_has_none(model, tmp_path):
    _, bundles = model
    (tmp_path / PLAIN).write_bytes(bundles[TIME_GRAPH].graph("unet").read_bytes())
    assert hoisted_graph.write_hoisted_graphs(tmp_path, "float32") == {}
    assert [path.name for path in tmp_path.iterdir()] == [PLAIN]
