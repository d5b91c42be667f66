"""Memory: what is counted before anything is loaded, components in turn, and the largest batch."""

import logging
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import FileRecord
from sdrt.engine import LazyEngine, select_backend
from sdrt.engine.memory_budget import check_memory, compute_budget, free_bytes, max_batch_images
from sdrt.errors import BackendError
from sdrt.export import activation_memory

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"
OPTIONS = {"num_inference_steps": 3, "seed": [3, 4], "num_images_per_prompt": 2}


def test_what_is_alive_is_counted_by_the_axes(tmp_path):
    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)

    side = "2*((side - 1)//2) + 2"
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),  # a
        helper.make_node("Concat", ["a", "a"], ["b"], axis=1),  # a and b
        helper.make_node("Relu", ["b"], ["c"]),  # a, b and c
        helper.make_node("Add", ["c", "a"], ["y"]),  # a, c and y
    ]
    named = {"x": 3, "y": 6, "a": 3, "b": 6, "c": 6}
    x, y, *others = [value(name, "rows", channels, side) for name, channels in named.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], value_info=others)
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    actual = activation_memory.activations(tmp_path / "g.onnx", {"rows": 5, "side": 7})
    assert actual == 2 * 5 * 8 * (3 + 6 + 6)
    assert activation_memory.activations(tmp_path / "g.onnx", {"rows": 5}) == 2 * 5 * (3 + 6 + 6)
    with pytest.raises(ValueError, match="unknown axis"):
        activation_memory.evaluate_axis("__import__('os')", {})


def test_a_bundle_says_what_every_component_has_alive(shapes):
    bundle = open_bundle(shapes)
    size = bundle.manifest.sizes[0]
    for name, component in bundle.manifest.components.items():
        lengths = activation_memory.axis_lengths(bundle.manifest, size)
        assert (
            component.activations == activation_memory.activations(bundle.graph(name), lengths) > 0
        )
    doubled = activation_memory.axis_lengths(bundle.manifest, (2 * size[0], size[1])) | {"rows": 3}
    actual = activation_memory.activations(bundle.graph("unet"), doubled)
    assert 5.5 < actual / bundle.manifest.components["unet"].activations < 6.5


def grown(bundle, factor):
    """The bundle with so many times the weights, in its manifest."""
    files = {
        name: FileRecord(record.size * factor, record.sha256)
        for name, record in bundle.manifest.files.items()
    }
    return replace(bundle, manifest=replace(bundle.manifest, files=files))


def test_the_budget_is_printed_and_refused_with_the_numbers(shapes, caplog):
    bundle = open_bundle(shapes)
    with caplog.at_level(logging.DEBUG, logger="sdrt"):
        check_memory(bundle, None, sequential=False)
    assert "Memory: at least" in caplog.text and "MB free" in caplog.text
    for in_turn in (False, True):
        with pytest.raises(BackendError, match=r"needs at least [\d,]+ MB .* of host memory"):
            check_memory(grown(bundle, 10**9), None, in_turn)
    # Too large together, but not one by one.
    weights = compute_budget(bundle.manifest, (64, 64), 2).weights
    larger = grown(bundle, int(1.1 * free_bytes(None) / weights))
    with pytest.raises(BackendError, match=r"--low-memory needs [\d,]+ MB"):
        check_memory(larger, None, sequential=False)
    check_memory(larger, None, sequential=True)


def test_a_backend_without_room_is_left_for_the_next(shapes, monkeypatch, caplog):
    monkeypatch.setattr("sdrt.engine.memory_budget.available_bytes", lambda: 1000)
    with pytest.raises(BackendError, match="0 MB of host memory are free"):
        sdrt.load(shapes, backend="onnxruntime")
    assert "failed to load" in caplog.text


def test_in_turn_one_component_is_loaded_and_the_images_are_the_same(shapes, pipe):
    expected = pipe(PROMPT, **OPTIONS).images
    loaded = []
    with sdrt.load(shapes, backend="onnxruntime", low_memory=True) as own:
        lazy = {n: e for n, e in own.engines.items() if isinstance(e, LazyEngine)}
        assert set(lazy) == set(own.engines)

        def look(step):
            loaded.append([name for name, engine in lazy.items() if engine._engine])

        for _ in range(2):
            actual = own(PROMPT, on_step=look, **OPTIONS).images
            for a, b in zip(expected, actual, strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert loaded and all(names == ["unet"] for names in loaded)
        own(PROMPT, image=expected[0], strength=0.5, num_inference_steps=2)
        assert [name for name, engine in lazy.items() if engine._engine] == ["vae_decoder"]
        loaded.clear()
        actual = own(PROMPT, on_step=look, **OPTIONS, feature_reuse=2).images
        assert np.array_equal(actual[0], pipe(PROMPT, **OPTIONS, feature_reuse=2).images[0])
        assert all("unet" in names for names in loaded) and "unet_shallow" in loaded[-1]
    with pytest.raises(BackendError, match="closed"):
        own(PROMPT, num_inference_steps=1)


def test_the_largest_batch_is_what_fits_by_calculation(shapes):
    manifest = open_bundle(shapes).manifest
    needed = [compute_budget(manifest, (64, 64), 2 * count).total for count in range(1, 18)]
    assert needed[0] < needed[15]
    for free in range(needed[0], needed[15], 1_000_000):
        actual = max_batch_images(manifest, free)
        assert needed[actual - 1] <= free < needed[actual]
    assert max_batch_images(manifest, needed[16]) == 16
    assert max_batch_images(manifest, 0) == 1


def test_the_largest_batch_is_confirmed_by_one_evaluation(shapes):
    bundle, candidate = open_bundle(shapes), select_backend("onnxruntime")
    assert activation_memory.max_batch_images(bundle, candidate) == 16
    tried = []

    def load(of, name):
        tried.append(of.manifest.batch[2])
        if tried[-1] > 4:
            raise BackendError("out of memory")
        return candidate.load(of, name)

    assert activation_memory.max_batch_images(bundle, replace(candidate, load=load)) == 4
    assert tried == [16, 8, 4]
