"""The UNet with residual inputs: diffusers' own additions, and off without them."""

import json
import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from ip_adapters import KINDS, image_states, ip_adapter_weights, load_reference

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import (
    ADAPTER_STATE,
    CONTROL,
    DOWN_RESIDUAL,
    IP_ADAPTER_KV,
    IP_ADAPTER_SCALE,
    MID_RESIDUAL,
)
from sdrt.engine import select_backend
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.export.ip_adapter import build_ip_adapter

BACKENDS = ("onnxruntime", "openvino", "torch")


@pytest.fixture(params=["tiny_bundle", "tiny_xl_bundle"], scope="module")
def family(request):
    """A checkpoint's folder and its bundle, of which engines compute exactly."""
    bundle = open_bundle(request.getfixturevalue(request.param))
    exact = replace(bundle, manifest=replace(bundle.manifest, admitted={}))
    return request.getfixturevalue(request.param.removesuffix("_bundle")), exact


def feeds_for(bundle, rows=2, size=(48, 32)):
    """Random inputs by name, for latents whose sides differ and halve to odd ones."""
    rng = np.random.default_rng(0)
    lengths = axis_lengths(bundle.manifest, size, rows)
    return {
        spec.name: np.array([700.0, 40.0], np.float32)
        if spec.name == "timestep"
        else rng.normal(size=spec_shape(spec, lengths)).astype(np.float32)
        for spec in bundle.manifest.components[CONTROL].inputs
    }


def reference(folder, feeds, **residuals):
    """diffusers' output for the same inputs."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    t = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
    added = {"text_embeds": t["pooled"], "time_ids": t["time_ids"]} if "pooled" in t else None
    with torch.no_grad():
        plain = (t["sample"], t["timestep"], t["context"])
        return unet(*plain, added_cond_kwargs=added, **residuals).sample.numpy()


def of(feeds, prefix):
    count = sum(name.startswith(prefix) for name in feeds)
    return [torch.from_numpy(feeds[f"{prefix}_{i}"].copy()) for i in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_residuals_are_added_where_diffusers_adds_them(family, backend):
    folder, bundle = family
    feeds = feeds_for(bundle)
    engine = select_backend(backend).load(bundle, CONTROL)
    zero = {name: 0 * array for name, array in feeds.items()}
    every = (DOWN_RESIDUAL, MID_RESIDUAL, ADAPTER_STATE)
    for on in (every[:2], every[2:], every):
        residuals = {}
        if DOWN_RESIDUAL in on:
            residuals["down_block_additional_residuals"] = of(feeds, DOWN_RESIDUAL)
            residuals["mid_block_additional_residual"] = torch.from_numpy(feeds[MID_RESIDUAL])
        if ADAPTER_STATE in on:  # a list that diffusers empties
            residuals["down_intrablock_additional_residuals"] = of(feeds, ADAPTER_STATE)
        off = [n for n in feeds if n.startswith((*every, "ip_adapter")) and not n.startswith(on)]
        actual = engine({**feeds, **{name: zero[name] for name in off}})["output"]
        expected = reference(folder, feeds, **residuals)
        assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_are_as_none(family, backend):
    _, bundle = family
    feeds = feeds_for(bundle)
    plain = {spec.name for spec in bundle.manifest.components["unet"].inputs}
    off = {name: array if name in plain else 0 * array for name, array in feeds.items()}
    load = select_backend(backend).load
    expected = load(bundle, "unet")({name: feeds[name] for name in plain})["output"]
    actual = load(bundle, CONTROL)(off)["output"]
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_are_attended_as_diffusers_does(family, backend, kind):
    folder, bundle = family
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    weights = ip_adapter_weights(kind, unet)
    adapter = build_ip_adapter(weights)
    load_reference(unet, weights)
    torch.manual_seed(0)
    image = image_states(adapter.config)
    feeds = feeds_for(bundle)
    plain = {spec.name for spec in bundle.manifest.components["unet"].inputs}
    feeds = {name: array if name in plain else 0 * array for name, array in feeds.items()}
    scales = np.linspace(0.0, 1.0, len(adapter.config.layers), dtype=np.float32)
    layers = [p for name, p in unet.attn_processors.items() if "attn2" in name]
    for layer, scale in zip(layers, scales, strict=True):
        layer.scale = [float(scale)]
    t = {name: torch.from_numpy(array) for name, array in feeds.items()}
    added = {"image_embeds": [image[:, None]]}
    if "pooled" in t:
        added |= {"text_embeds": t["pooled"], "time_ids": t["time_ids"]}
    with torch.no_grad():
        keys_values = adapter(image).numpy()
        plain_inputs = (t["sample"], t["timestep"], t["context"])
        expected = unet(*plain_inputs, added_cond_kwargs=added).sample.numpy()
    feeds |= {IP_ADAPTER_KV: keys_values, IP_ADAPTER_SCALE: np.stack([scales] * 2)}
    actual = select_backend(backend).load(bundle, CONTROL)(feeds)["output"]
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_bundle_without_the_graph_still_loads(shapes, tmp_path):
    old = shutil.copytree(shapes, tmp_path / "old")
    (old / "unet" / "control.onnx").unlink()
    raw = json.loads((old / "sdrt.json").read_text())
    del raw["files"]["unet/control.onnx"], raw["components"][CONTROL]
    (old / "sdrt.json").write_text(json.dumps(raw))
    with sdrt.load(old) as pipe:
        assert CONTROL not in pipe.engines
        assert pipe("a red circle", num_inference_steps=1).images
