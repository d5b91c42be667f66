"""Whatever torch raises in the torch backend is a BackendError, so that the next backend is tried
and a smaller batch.
"""

import numpy as np
import pytest
import torch

from sdrt.bundle import open_bundle
from sdrt.engine.torch import ops
from sdrt.engine.torch.engine import TorchEngine
from sdrt.errors import BackendError

FEEDS = {"latents": np.zeros((1, 4, 4, 4), np.float32)}
FAULTS = {
    "of memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "fewer"),
    "of the driver": (RuntimeError("CUDA error: an illegal memory access\nadvice"), ""),
    "of an index": (IndexError("index out of range in self"), ""),
}


def loaded(shapes, name="vae_decoder", **options):
    bundle = open_bundle(shapes)
    return TorchEngine(name, bundle.graph(name), bundle.manifest.components[name], "cpu", **options)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_node_by_node_is_an_error_of_the_backend(shapes, fault, monkeypatch):
    error, hint = FAULTS[fault]

    def fail(inputs, attributes):
        raise error

    monkeypatch.setitem(ops.OPERATIONS, "Conv", fail)
    with pytest.raises(BackendError) as caught:
        loaded(shapes)(FEEDS)
    assert "vae_decoder" in caught.value.message and "advice" not in caught.value.message
    assert str(error).split("\n")[0] in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.integration
def test_a_fault_while_compiling_is_too(shapes, monkeypatch):
    def fail(inputs, attributes):
        raise RuntimeError("no such kernel")

    engine = loaded(shapes, compile=True)
    monkeypatch.setattr("sdrt.engine.torch.engine.compiled", lambda *_: lambda _: fail(None, None))
    with pytest.raises(BackendError) as caught:
        engine(FEEDS)
    assert "no such kernel" in caught.value.message
    assert caught.value.hint == "run without compiling"


def test_weights_that_do_not_fit_are_said_while_loading(shapes, monkeypatch):
    def fail(self, names):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TorchEngine, "_stored_weights", fail)
    with pytest.raises(BackendError, match="out of memory in unet"):
        loaded(shapes, "unet")


def test_an_id_outside_the_vocabulary_is_an_error_of_the_backend(shapes):
    engine = loaded(shapes, "text_encoder")
    tokens = engine.inputs[0].shape[1]
    with pytest.raises(BackendError, match="torch failed in text_encoder"):
        engine({"input_ids": np.full((1, tokens), 10**6, np.int32)})
