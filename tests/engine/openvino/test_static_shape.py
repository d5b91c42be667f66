"""An engine for one shape of calls gives a row the same bytes in every call and serves all."""

import numpy as np
import pytest

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import SHALLOW
from sdrt.bundle.safetensors import Tensors
from sdrt.engine import LoadOptions, select_backend
from sdrt.engine.parity import sample_input
from sdrt.errors import BackendError, UsageError
from sdrt.runtime.vae import Tiling

pytestmark = pytest.mark.integration

pytest.importorskip("openvino")

SIZE = (64, 48)  # in pixels
LENGTHS = {"tokens": 32, "latent_height": 6, "latent_width": 8}
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def bundle(shapes):
    return open_bundle(shapes)


@pytest.fixture
def load(bundle):
    engines = []

    def load(name, size=SIZE):
        candidate = select_backend("openvino", options=LoadOptions(static_size=size))
        engines.append(candidate.load(bundle, name))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def feeds_of(engine, rows, **lengths):
    lengths = {"rows": rows, **LENGTHS, **lengths}
    shapes = {s.name: tuple(lengths.get(a, a) for a in s.shape) for s in engine.inputs}
    return {s.name: sample_input(s.dtype, shapes[s.name]) for s in engine.inputs}


def outcome(engine, feeds):
    return next(iter(engine(feeds).values()))


@pytest.mark.parametrize("name", ["unet", SHALLOW, "vae_decoder"])
def test_a_row_has_the_bytes_it_has_alone(load, name):
    fixed, dynamic = load(name), load(name, None)
    feeds = feeds_of(fixed, rows=5)
    actual = outcome(fixed, feeds)
    assert len({row.tobytes() for row in actual}) == 5
    for i, row in enumerate(actual):
        alone = outcome(fixed, {key: array[i : i + 1] for key, array in feeds.items()})
        assert alone.tobytes() == row.tobytes()
    expected = outcome(dynamic, feeds)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_other_sizes_and_longer_prompts_are_computed_as_without(load):
    fixed, dynamic = load("unet"), load("unet", None)
    for lengths in ({"latent_height": 12}, {"tokens": 64}):
        feeds = feeds_of(fixed, rows=3, **lengths)
        assert outcome(fixed, feeds).tobytes() == outcome(dynamic, feeds).tobytes()


def test_new_weights_are_those_of_every_size(load, bundle):
    fixed, dynamic = load("unet"), load("unet", None)
    feeds, large = feeds_of(fixed, rows=2), feeds_of(fixed, rows=2, latent_height=12)
    name = "conv_out.weight"
    stored = Tensors(bundle.folder / "unet" / "model.safetensors")[name]
    before = outcome(fixed, feeds)
    for weights in ({name: stored * 2}, {name: stored * 3}, {}):
        fixed.refit(weights)
        dynamic.refit(weights)
        assert outcome(fixed, large).tobytes() == outcome(dynamic, large).tobytes()
        near = outcome(dynamic, feeds)
        np.testing.assert_allclose(outcome(fixed, feeds), near, atol=1e-4 * np.abs(near).max())
    assert outcome(fixed, feeds).tobytes() == before.tobytes()


def test_images_of_a_batch_have_the_bytes_of_images_alone(shapes):
    with sdrt.load(shapes, backend="openvino", static_size="64x64") as pipe:
        batch = pipe(PROMPT, num_images_per_prompt=3, num_inference_steps=4, seed=7).images
        for i, image in enumerate(batch):
            alone = pipe(PROMPT, num_inference_steps=4, seed=7 + i).images[0]
            assert alone.tobytes() == image.tobytes()
        assert pipe(PROMPT, num_inference_steps=1, size="96x64").images[0].size == (96, 64)


@pytest.mark.parametrize("size", [(64, 48), (64, 64), (96, 128), (128, 32)])
def test_the_decoder_is_compiled_for_what_is_decoded_at_once(bundle, size):
    from sdrt.engine.openvino.static_shape import static_shapes

    sides = [(height // 8, width // 8) for width, height in bundle.manifest.sizes]
    calls = set()

    def network(tile):
        calls.add(tile.shape)
        return np.zeros((1, 3, *(8 * side for side in tile.shape[2:])), np.float32)

    Tiling(sides, 8).decode(network, np.zeros((1, 4, size[1] // 8, size[0] // 8), np.float32))
    assert calls == {static_shapes(bundle, "vae_decoder", size)["latents"]}


def test_once_closed_it_answers_no_size(load):
    fixed = load("unet")
    fixed.close()
    for lengths in ({}, {"latent_height": 12}):
        with pytest.raises(BackendError, match="unet is closed"):
            fixed(feeds_of(fixed, rows=1, **lengths))


def test_it_is_refused_where_it_would_do_nothing(shapes):
    with pytest.raises(UsageError, match="only for the openvino backend, not auto"):
        sdrt.load(shapes, static_size="64x64")
    with pytest.raises(UsageError, match=r"^static_size 72x64 is not in this bundle"):
        sdrt.load(shapes, backend="openvino", static_size=(72, 64))
    with pytest.raises(UsageError, match=r"^static_size '64' is not WIDTHxHEIGHT"):
        sdrt.load(shapes, backend="openvino", static_size="64")
