"""Memory that an engine holds between its calls is released before a large image is decoded."""

import threading

import pytest

import sdrt
from sdrt.bundle import open_bundle
from sdrt.engine import select_backend
from sdrt.engine.parity import sample_input
from sdrt.errors import BackendError
from sdrt.runtime import stages

pytestmark = pytest.mark.integration

pytest.importorskip("openvino")

LENGTHS = {"rows": 2, "tokens": 32, "latent_height": 8, "latent_width": 8}
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def unet(shapes):
    engine = select_backend("openvino").load(open_bundle(shapes), "unet")
    yield engine
    engine.close()


def outcome(unet):
    shapes = {s.name: tuple(LENGTHS.get(a, a) for a in s.shape) for s in unet.inputs}
    feeds = {s.name: sample_input(s.dtype, shapes[s.name]) for s in unet.inputs}
    return next(iter(unet(feeds).values())).tobytes()


def test_a_call_after_a_release_has_the_same_bytes(unet):
    expected = outcome(unet)
    unet.release_memory()
    assert outcome(unet) == expected
    unet.release_memory()
    unet.release_memory()
    assert outcome(unet) == expected


def test_releasing_during_calls_disturbs_none(unet):
    expected, actual = outcome(unet), []
    callers = [
        threading.Thread(target=lambda: actual.extend(outcome(unet) for _ in range(20)))
        for _ in range(2)
    ]
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        unet.release_memory()
    assert actual == [expected] * 40


@pytest.mark.parametrize("static_size", [None, "64x64"])
def test_memory_is_released_before_a_large_image_is_decoded(shapes, monkeypatch, static_size):
    from sdrt.engine.openvino.engine import OpenVinoEngine

    calls = []
    inner = OpenVinoEngine.release_memory

    def release(engine):
        calls.append(engine.name)
        inner(engine)

    monkeypatch.setattr(OpenVinoEngine, "release_memory", release)
    with sdrt.load(shapes, backend="openvino", static_size=static_size) as pipe:
        small = pipe(PROMPT, num_inference_steps=2, seed=0).images[0]
        assert not calls
        monkeypatch.setattr(stages, "LARGE", 64 * 64)
        large = pipe(PROMPT, num_inference_steps=2, seed=0).images[0]
    assert {"text_encoder", "unet", "vae_decoder"} <= set(calls)
    assert large.tobytes() == small.tobytes()


def test_a_closed_engine_releases_nothing(shapes):
    engine = select_backend("openvino").load(open_bundle(shapes), "unet")
    engine.close()
    engine.release_memory()
    with pytest.raises(BackendError, match="is closed"):
        outcome(engine)
