"""Layers whose weights stay in half precision compute what they compute in float32."""

import pytest
import torch
from torch import nn

from sdrt.errors import CheckpointError
from sdrt.export import stored_weights
from sdrt.export.modules import load_weights
from sdrt.export.stored_weights import convert


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def both(request, monkeypatch):
    """The same weights in float32, and stored in half precision."""
    torch.manual_seed(0)
    weights = {name: w.to(request.param) for name, w in Net().state_dict().items()}
    wide = load_weights(Net(), dict(weights), "unet")
    monkeypatch.setattr(stored_weights, "MIN_BYTES", 0)
    return wide, load_weights(Net(), dict(weights), "unet", stored=True), request.param


def test_stored_weights_compute_bit_for_bit_what_float32_does(both):
    wide, stored, dtype = both
    assert stored.conv.weight.dtype == stored.linear.weight.dtype == dtype
    assert stored.norm.weight.dtype == stored.linear.bias.dtype == torch.float32
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(stored(x), wide(x)) and torch.equal(stored(x), wide(x))
    assert stored.conv.weight.dtype == dtype


def test_a_call_that_fails_leaves_the_stored_weights(both):
    _, stored, dtype = both
    with pytest.raises(RuntimeError):
        stored(torch.randn(2, 4, 5, 5))
    assert stored.conv.weight.dtype == dtype
    assert stored(torch.randn(1, 3, 5, 5)).dtype == torch.float32


def test_a_converted_module_is_plain(both):
    wide, stored, _ = both
    half = convert(stored, torch.float16)
    expected = wide.half().state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in half.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in half.modules())


def test_small_weights_are_converted_when_they_are_loaded():
    weights = {name: w.half() for name, w in Net().state_dict().items()}
    loaded = load_weights(Net(), weights, "unet", stored=True)
    assert {w.dtype for w in loaded.state_dict().values()} == {torch.float32}


def test_damaged_half_precision_weights_are_refused():
    weights = {name: w.half() for name, w in Net().state_dict().items()}
    weights["conv.weight"][0] = torch.inf
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load_weights(Net(), weights, "unet", stored=True)
