"""Graphs whose rows have LoRA factors: off without them, and as torch computes them with."""

import numpy as np
import pytest
from lora_graphs import with_lora_graphs

from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import LORA_FACTORS, LORA_PARTS
from sdrt.bundle.safetensors import Tensors
from sdrt.engine import select_backend
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.errors import UsageError
from sdrt.export.build import BuildPlan, build_bundle

BACKENDS = ("onnxruntime", "openvino", "torch")
RANK = 3


@pytest.fixture(scope="module")
def bundle(shapes, tmp_path_factory):
    return with_lora_graphs(shapes, tmp_path_factory.mktemp("rows") / "rows", RANK)


def feeds_for(bundle, part, rows=3):
    rng = np.random.default_rng(0)
    lengths = axis_lengths(bundle.manifest, (64, 48), rows)
    feeds = {}
    for spec in bundle.manifest.components[LORA_PARTS[part]].inputs:
        shape = spec_shape(spec, lengths)
        random = rng.integers(0, 50, shape) if spec.dtype == "int32" else rng.normal(size=shape)
        feeds[spec.name] = random.astype(spec.dtype)
    if part == "unet":
        feeds["timestep"] = np.array([700.0, 40.0, 3.0], np.float32)[:rows]
    feeds[LORA_FACTORS] *= np.float32(0.1)
    return feeds


def of_row(feeds, i):
    return {name: value[i : i + 1] for name, value in feeds.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_zeros_are_as_none_and_other_rows_change_nothing(bundle, backend, part):
    load = select_backend(backend).load
    feeds = feeds_for(bundle, part)
    plain = {name: value for name, value in feeds.items() if name != LORA_FACTORS}
    feeds[LORA_FACTORS][1] = 0.0
    expected, actual = load(bundle, part)(plain), load(bundle, LORA_PARTS[part])(feeds)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert np.array_equal(value[1], expected[name][1]), name
        assert not np.allclose(value[0], expected[name][0], atol=1e-3), name


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_row_has_the_output_that_it_has_alone(bundle, part):
    engine = select_backend("onnxruntime").load(bundle, LORA_PARTS[part])
    feeds = feeds_for(bundle, part)
    together = engine(feeds)
    for i in range(3):
        for name, value in engine(of_row(feeds, i)).items():
            assert np.array_equal(value[0], together[name][i])


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_factors_are_as_their_product_in_the_weights(bundle, part):
    load, feeds = select_backend("onnxruntime").load, of_row(feeds_for(bundle, part), 0)
    stored = Tensors(bundle.graph(part).with_name("model.safetensors"))
    merged, at = {}, 0
    for name in bundle.manifest.components[LORA_PARTS[part]].weights:
        shape = stored.shape(name)
        inside, out = shape if name.endswith(".T") else shape[1::-1]
        down, up = np.split(
            feeds[LORA_FACTORS][0][at : at + RANK * (inside + out)], [RANK * inside]
        )
        at += RANK * (inside + out)
        delta = down.reshape(inside, RANK) @ up.reshape(RANK, out)
        merged[name] = stored[name] + (delta if name.endswith(".T") else delta.T).reshape(shape)
    assert at == feeds[LORA_FACTORS].shape[1]
    assert len(merged) == (48 if part == "unet" else 18)
    plain = load(bundle, part)
    plain.refit(merged)
    expected = plain({name: value for name, value in feeds.items() if name != LORA_FACTORS})
    for name, value in load(bundle, LORA_PARTS[part])(feeds).items():
        assert np.abs(value - expected[name]).max() < 1e-4 * np.abs(expected[name]).max()


@pytest.mark.parametrize("family", ["tiny", pytest.param("tiny_xl", marks=pytest.mark.slow)])
def test_a_build_validates_every_graph_and_counts_its_input(family, request, build_once, tmp_path):
    checkpoint = str(request.getfixturevalue(family))
    sizes = ((32, 32), (48, 32))
    built = open_bundle(build_once(checkpoint, tmp_path / "b", sizes=sizes, lora_rank=4))
    parts = built.manifest.components
    encoders = {"text_encoder", "text_encoder_2"} & set(parts)
    assert {name for name in parts if name.endswith("_lora")} == {
        LORA_PARTS[part] for part in ("unet", *encoders)
    }
    for part in ("unet", *encoders):
        component = parts[LORA_PARTS[part]]
        assert component.parity["cosine"] > 0.9999 and component.weights
        factors = next(spec for spec in component.inputs if spec.name == LORA_FACTORS)
        added = 4 * int(factors.shape[1])
        assert component.activations >= parts[part].activations + added


def test_a_rank_out_of_range_is_refused(tiny, tmp_path):
    for rank in (0, 257):
        with pytest.raises(UsageError, match="lora_rank"):
            build_bundle(BuildPlan(str(tiny), tmp_path / "b", lora_rank=rank))
