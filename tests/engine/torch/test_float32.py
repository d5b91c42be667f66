"""Float32 on a GPU is float32: convolutions and products that round as TensorFloat-32 does, where
torch's settings let them.
"""

import numpy as np
import pytest
import torch

from sdrt.bundle import open_bundle
from sdrt.engine import parity
from sdrt.engine.torch import ops
from sdrt.engine.torch.engine import TorchEngine
from sdrt.engine.torch.float32 import ieee_float32
from sdrt.errors import BackendError, ParityError

NAME = "vae_decoder"


def round_to_tf32(value):
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def rounding(operation, setting):
    """As tensor cores compute it: two operands of 10 bits."""

    def compute(inputs, attributes):
        if setting.fp32_precision == "tf32":
            inputs = [*map(round_to_tf32, inputs[:2]), *inputs[2:]]
        return operation(inputs, attributes)

    return compute


@pytest.fixture
def emulated(monkeypatch):
    backends = torch.backends
    for kind, setting in (("Conv", backends.cudnn.conv), ("MatMul", backends.cuda.matmul)):
        monkeypatch.setitem(ops.OPERATIONS, kind, rounding(ops.OPERATIONS[kind], setting))


@pytest.fixture
def settings():
    """The user's own, which are other than torch's."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul]
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_a_float32_bundle_keeps_its_thresholds(shapes, emulated, settings):
    bundle = open_bundle(shapes)
    component, graph = bundle.manifest.components[NAME], bundle.graph(NAME)
    feeds = {"latents": np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)}
    engine = TorchEngine(NAME, graph, component, "cpu")
    with ieee_float32():
        exact = engine(feeds)["image"]
    rounded = engine(feeds)["image"]
    with pytest.raises(ParityError):  # so the emulation rounds, and the settings matter
        parity.check(NAME, parity.measure(rounded, exact, is_image=True), component.dtype)
    from sdrt.engine.onnxruntime.cpu import OrtEngine

    expected = OrtEngine(NAME, graph, component)(feeds)["image"]
    parity.check(NAME, parity.measure(exact, expected, is_image=True), component.dtype)


def test_a_gpu_computes_in_full_and_the_process_keeps_its_settings(shapes, monkeypatch, settings):
    before, seen = [setting.fp32_precision for setting in settings], []

    def watch(inputs, attributes):
        seen.append([setting.fp32_precision for setting in settings])
        raise RuntimeError("seen")

    monkeypatch.setitem(ops.OPERATIONS, "Conv", watch)
    bundle = open_bundle(shapes)
    component = bundle.manifest.components[NAME]
    engine = TorchEngine(NAME, bundle.graph(NAME), component, "meta")  # any but the CPU
    with pytest.raises(BackendError, match="seen"):
        engine({"latents": np.zeros((1, 4, 8, 8), np.float32)})
    assert seen == [["ieee"] * 3] and "tf32" in before
    assert [setting.fp32_precision for setting in settings] == before
