"""Control within limits of memory: components in turn, the budget, the largest batch."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import CONTROL, FileRecord
from sdrt.engine import LazyEngine, select_backend
from sdrt.engine.memory_budget import (
    check_memory,
    compute_budget,
    compute_full_budget,
    free_bytes,
    weight_bytes,
)
from sdrt.errors import BackendError
from sdrt.export.activation_memory import max_batch_images

pytestmark = pytest.mark.integration
PROMPT = "a red circle on a blue background"
OPTIONS = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def edges():
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).ellipse((6, 6, 38, 38), outline=255)
    return image


@pytest.fixture(scope="module")
def controlled(shapes):
    with sdrt.load(shapes, backend="onnxruntime", controlnet="outline") as loaded:
        yield loaded


def test_in_turn_the_images_are_the_same(shapes, controlled, edges):
    options = {**OPTIONS, "seed": [3, 4], "num_images_per_prompt": 2}
    control = {"control_image": edges, "control_guidance_end": 0.75}
    expected = controlled(PROMPT, **control, **options).images
    plain = controlled(PROMPT, **options).images
    loaded = []
    with sdrt.load(shapes, backend="onnxruntime", controlnet="outline", low_memory=True) as own:
        lazy = {n: e for n, e in own.engines.items() if isinstance(e, LazyEngine)}

        def look(step):
            loaded.append({name for name, engine in lazy.items() if engine._engine})

        for arguments, images in ((control, expected), ({}, plain)):
            actual = own(PROMPT, on_step=look, **arguments, **options).images
            for a, b in zip(images, actual, strict=True):
                assert a.tobytes() == b.tobytes()
    net = "controlnet/outline"
    assert loaded[0] == {CONTROL, net}  # alternate, so both stay; the interval ends after three
    assert loaded[3] == loaded[-1] == {"unet", net}


def test_nets_count_in_the_budget(shapes):
    bundle, net = open_bundle(shapes), open_bundle("outline")
    check_memory(bundle, None, sequential=False, control_bundles=[net])
    budget = compute_budget(bundle.manifest, (64, 64), 2)
    factor = int(0.9 * (free_bytes(None) - budget.total) / net.bytes)
    files = {
        name: FileRecord(record.size * factor, record.sha256)
        for name, record in net.manifest.files.items()
    }
    large = replace(net, manifest=replace(net.manifest, files=files))
    check_memory(bundle, None, sequential=False, control_bundles=[large])
    for in_turn in (False, True):  # nets stay loaded next to the UNet
        with pytest.raises(BackendError, match=r"needs at least [\d,]+ MB .* of host memory"):
            check_memory(bundle, None, in_turn, control_bundles=[large, large])


def test_the_second_graph_holds_the_weights_again(shapes):
    bundle, net = open_bundle(shapes), open_bundle("outline")
    alone, controlled = compute_full_budget(bundle), compute_full_budget(bundle, [net])
    unet = weight_bytes(bundle.manifest, "unet")
    assert unet > 0 and controlled.weights == alone.weights + net.bytes + unet
    in_turn = [compute_full_budget(bundle, nets, sequential=True) for nets in ([], [net])]
    assert in_turn[1].weights == in_turn[0].weights + net.bytes


def test_the_largest_batch_holds_under_control(shapes, controlled, edges, monkeypatch):
    """The batch that `--batch auto` writes is of the plain UNet; control splits it where memory is
    short, and the images are those of each alone.
    """
    bundle = open_bundle(shapes)
    largest = max_batch_images(bundle, select_backend("onnxruntime"))
    assert largest == 16
    own = replace(controlled, manifest=replace(controlled.manifest, batch=(1, 1, largest)))
    seeds = list(range(6))
    options = {**OPTIONS, "control_image": edges, "num_images_per_prompt": len(seeds)}
    counted = CountedEngine(own.engines[CONTROL])
    own = replace(own, engines={**own.engines, CONTROL: counted})
    together = own(PROMPT, seed=seeds, **options).images
    assert set(counted.rows) == {2 * len(seeds)}
    estimator = own.memory_estimator
    two = estimator.required_bytes((64, 64), 4, keeps_scores=True)
    monkeypatch.setattr(type(estimator), "free_bytes", lambda self: two)
    counted.rows.clear()
    split = own(PROMPT, seed=seeds, **options).images
    assert set(counted.rows) == {4}
    for a, b in zip(together, split, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


class CountedEngine:
    """An engine that stores the rows of its calls."""

    def __init__(self, engine):
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.rows = []

    def __call__(self, feeds):
        self.rows.append(len(feeds["sample"]))
        return self.engine(feeds)
