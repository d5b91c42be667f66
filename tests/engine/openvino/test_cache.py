"""A kept model gives the same numbers, is what is mapped, and gives way to other weights."""

import logging
from pathlib import Path

import numpy as np
import pytest

from sdrt.bundle import integrity as bundles
from sdrt.bundle import open_bundle
from sdrt.bundle.safetensors import Tensors
from sdrt.engine import compile_cache
from sdrt.engine.cpu import has_bf16
from sdrt.engine.parity import sample_input

pytestmark = pytest.mark.integration

pytest.importorskip("openvino")

LENGTHS = {"rows": 2, "tokens": 32, "latent_height": 8, "latent_width": 12}
PRECISIONS = ("f32", "bf16") if has_bf16() else ("f32",)


@pytest.fixture(scope="module")
def bundle(shapes):
    return open_bundle(shapes)


@pytest.fixture
def load_compiled(bundle, tmp_path, monkeypatch):
    """Makes a component's model in a home where even the smallest is kept."""
    from sdrt.engine.openvino.cache import load_compiled

    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "MIN_WEIGHT_BYTES", 0)
    return lambda name, precision: load_compiled(bundle, name, precision)


def opened(bundle, name, precision, cached):
    from sdrt.engine.openvino.engine import OpenVinoEngine

    component = bundle.manifest.components[name]
    return OpenVinoEngine(name, bundle.graph(name), component, precision, cached)


def outcome(engine):
    shapes = {s.name: tuple(LENGTHS.get(a, a) for a in s.shape) for s in engine.inputs}
    feeds = {s.name: sample_input(s.dtype, shapes[s.name]) for s in engine.inputs}
    return next(iter(engine(feeds).values())).copy()


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.sample(2)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_a_kept_model_gives_the_same_numbers(bundle, load_compiled, name, precision, tmp_path):
    cached = load_compiled(name, precision)
    written = cached.stat().st_mtime_ns
    assert load_compiled(name, precision) == cached and cached.stat().st_mtime_ns == written
    assert cached.is_relative_to(tmp_path)
    weights = bundle.folder / name / "model.safetensors"
    assert cached.stat().st_size < 0.2 * weights.stat().st_size + 1_000_000
    stored = cached.with_name("model.bin")
    if precision == "bf16" and name != "text_encoder":  # whose table of tokens stays in float32
        assert stored.stat().st_size < 0.6 * weights.stat().st_size
    engine = opened(bundle, name, precision, cached)
    assert is_mapped(stored)
    actual, plain = outcome(engine), outcome(opened(bundle, name, precision, None))
    assert np.abs(plain).max() > 0.1
    assert actual.tobytes() == plain.tobytes()
    engine.close()


def test_products_read_their_weights_turned(bundle):
    import openvino as ov

    from sdrt.engine.openvino.cache import _transpose_weights

    model = ov.Core().read_model(str(bundle.graph("unet")))
    before = stored_turned(model)
    assert before and not any(before.values())
    _transpose_weights(model)
    after = stored_turned(model)
    assert after.keys() == before.keys() and all(after.values())


def stored_turned(model):
    """Whether each product of a weight that the bundle stores as [in, out] reads [out, in]."""
    products = [node for node in model.get_ops() if node.get_type_name() == "MatMul"]
    named = {node.input_value(1).get_node().get_friendly_name(): node for node in products}
    return {
        name: node.get_attributes()["transpose_b"]
        for name, node in named.items()
        if name.endswith(".T")
    }


def test_other_weights_come_and_go(bundle, load_compiled):
    both = [
        opened(bundle, "unet", "f32", cached) for cached in (None, load_compiled("unet", "f32"))
    ]
    before = outcome(both[0])
    weights = Tensors(bundle.folder / "unet" / "model.safetensors")
    name = next(n for n in sorted(weights) if n.endswith(".T"))
    for engine in both:
        engine.refit({name: 2 * weights[name]})
    plain, actual = map(outcome, both)
    assert np.abs(plain - before).max() > 1e-3
    np.testing.assert_allclose(actual, plain, atol=1e-5 * np.abs(plain).max())
    for engine in both:
        engine.refit({})
        np.testing.assert_allclose(outcome(engine), before, atol=1e-5 * np.abs(before).max())
        engine.close()


def test_what_was_just_made_is_not_hashed_again(load_compiled, monkeypatch):
    load_compiled("text_encoder", "f32")
    read, seen = bundles.hash_file, []
    monkeypatch.setattr(bundles, "hash_file", lambda path: seen.append(path) or read(path))
    cached = load_compiled("text_encoder", "f32")
    assert seen == []
    weights = cached.with_name("model.bin")
    full = weights.read_bytes()
    weights.write_bytes(full[:-1] + bytes([full[-1] ^ 1]))
    assert load_compiled("text_encoder", "f32") == cached and weights in seen
    assert weights.read_bytes() == full


def test_a_kept_model_that_does_not_open_is_compiled(bundle, load_compiled, caplog):
    cached = load_compiled("text_encoder", "f32")
    cached.write_bytes(b"none")
    with caplog.at_level(logging.WARNING, "sdrt"):
        engine = opened(bundle, "text_encoder", "f32", cached)
    assert "failed to import" in caplog.text
    np.testing.assert_array_equal(
        outcome(engine), outcome(opened(bundle, "text_encoder", "f32", None))
    )
    assert not is_mapped(cached.with_name("model.bin"))
    engine.close()
