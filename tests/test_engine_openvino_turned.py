"""Turned weights give the same numbers, are what is mapped, and give way to other weights."""

from pathlib import Path

import numpy as np
import pytest

from sdrt.bundle import open_bundle
from sdrt.engine import kept as kept_folder
from sdrt.engine.comparing import sample_of
from sdrt.tensors import Tensors

pytest.importorskip("openvino")

LENGTHS = {"rows": 2, "tokens": 32, "latent_height": 8, "latent_width": 12}


@pytest.fixture(scope="module")
def bundle(shapes):
    return open_bundle(shapes)


@pytest.fixture(params=["text_encoder", "unet"])
def engines(bundle, request, tmp_path, monkeypatch):
    """A component without turned weights and with them, and what both are fed."""
    from sdrt.engine.openvino_cpu import OpenVinoEngine
    from sdrt.engine.openvino_turned import turned

    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    monkeypatch.setattr(kept_folder, "WORTH", 0)
    name = request.param
    component, file = bundle.manifest.components[name], turned(bundle, name)
    assert file == turned(bundle, name) and file.is_relative_to(tmp_path)
    both = [
        OpenVinoEngine(name, bundle.graph(name), component, "f32", each) for each in (None, file)
    ]
    assert str(file) in Path("/proc/self/maps").read_text()
    shapes = {s.name: tuple(LENGTHS.get(a, a) for a in s.shape) for s in component.inputs}
    yield both, {s.name: sample_of(s.dtype, shapes[s.name]) for s in component.inputs}
    for engine in both:
        engine.close()


def outcomes(engines, feeds):
    return [next(iter(engine(feeds).values())).copy() for engine in engines]


def test_turned_weights_give_the_same_numbers(engines):
    both, feeds = engines
    plain, found = outcomes(both, feeds)
    assert np.abs(plain).max() > 0.1
    np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max())


def test_other_weights_come_and_go(engines, bundle):
    both, feeds = engines
    before, _ = outcomes(both, feeds)
    weights = Tensors(bundle.folder / both[0].name / "model.safetensors")
    name = next(n for n in sorted(weights) if n.endswith(".T"))
    for engine in both:
        engine.refit({name: 2 * weights[name]})
    plain, found = outcomes(both, feeds)
    assert np.abs(plain - before).max() > 1e-3
    np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max())
    for engine in both:
        engine.refit({})
    for made in outcomes(both, feeds):
        np.testing.assert_allclose(made, before, atol=1e-5 * np.abs(before).max())


def test_a_model_without_products_has_nothing_to_map(tmp_path):
    import openvino as ov
    from openvino import opset13 as operations

    from sdrt.engine.openvino_turned import put_turned

    given = operations.parameter([2, 2], np.float32)
    model = ov.Model([operations.relu(given)], [given])
    (empty := tmp_path / "turned.bin").touch()
    assert put_turned(model, empty) is None
