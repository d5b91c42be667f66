"""RRDBNet against the paper's equations, and the layouts of its weights."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from sdrt.errors import CheckpointError
from sdrt.export.esrgan import RrdbConfig, RrdbNet, load_rrdb
from sdrt.export.upscaler_build import find_upscaler_file

SCALES = {2: RrdbConfig(8, 4, 2, 2, shuffle=2), 4: RrdbConfig(8, 4, 2, 2)}


def tiny(scale=4, seed=0):
    torch.manual_seed(seed)
    return dict(RrdbNet(SCALES[scale]).state_dict())


def reference(weights, image, shuffle):
    """ESRGAN (arXiv:1809.00219), fig. 4 and section 3.1, in functions over named weights."""

    def conv(name, x):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    x = F.pixel_unshuffle(image, shuffle) if shuffle > 1 else image
    x = first = conv("conv_first", x)
    for block in range(2):
        entry = x
        for dense in (1, 2, 3):
            parts = [x]
            for layer in (1, 2, 3, 4):
                name = f"body.{block}.rdb{dense}.conv{layer}"
                parts.append(leaky(conv(name, torch.cat(parts, 1))))
            x = x + 0.2 * conv(f"body.{block}.rdb{dense}.conv5", torch.cat(parts, 1))
        x = entry + 0.2 * x
    x = first + conv("conv_body", x)
    for layer in ("conv_up1", "conv_up2"):
        x = leaky(conv(layer, x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    return conv("conv_last", leaky(conv("conv_hr", x)))


def second_release(weights):
    names = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2"}
    names |= {"conv_hr": "HRconv"}
    renamed = {}
    for name, tensor in weights.items():
        layer, _, rest = name.partition(".")
        if layer == "body":
            name = f"RRDB_trunk.{rest.replace('rdb', 'RDB')}"
        renamed[f"{names[layer]}.{rest}" if layer in names else name] = tensor
    return renamed


def first_release(weights):
    """Layers are numbered over a flat list that also has activations."""
    names = {"conv_first": "model.0", "conv_body": "model.1.sub.2", "conv_up1": "model.3"}
    names |= {"conv_up2": "model.6", "conv_hr": "model.8", "conv_last": "model.10"}
    renamed = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"body\.(\d)\.rdb(\d)\.conv(\d)", layer)
        if block:
            layer = "model.1.sub.{}.RDB{}.conv{}.0".format(*block.groups())
        renamed[f"{names.get(layer, layer)}.{kind}"] = tensor
    return renamed


def wrapped(weights):
    return {f"params_ema.{name}": tensor for name, tensor in weights.items()}


LAYOUTS = [dict, wrapped, second_release, first_release]


@pytest.mark.reference
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_papers_network(layout, scale):
    weights = tiny(scale)
    net = load_rrdb(layout(weights), "a file")
    assert net.config == SCALES[scale] and net.config.scale == scale
    image = torch.rand(2, 3, 10, 14)
    with torch.no_grad():
        expected = reference(weights, image, net.config.shuffle)
        torch.testing.assert_close(net(image), expected, rtol=0, atol=1e-6)
    assert expected.shape == (2, 3, 10 * scale, 14 * scale)


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"body.0.weight": torch.zeros(1)}, "is not an ESRGAN upscaler"),
        (lambda _: {}, "is not an ESRGAN upscaler"),
        (without("conv_hr.bias"), "conv_hr.bias has shape None"),
        (without("body.1.rdb3.conv5.weight"), "body.1.rdb3.conv5.weight has shape None"),
        (lambda w: w | {"body.0.rdb1.conv1x1.weight": torch.zeros(1)}, "conv1x1"),
        (lambda w: w | {"conv_last.weight": torch.zeros(1, 8, 3, 3)}, "conv_last.weight"),
        (lambda w: w | {"conv_first.weight": torch.zeros(8, 1, 3, 3)}, "images of 1 channels"),
        (lambda w: w | {"conv_first.weight": torch.zeros(8)}, "is no convolution"),
        (lambda w: w | {"body.99.rdb1.conv1.weight": torch.zeros(1)}, "blocks"),
    ],
)
def test_other_networks_are_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        load_rrdb(change(tiny()), "a file")


def test_files_are_found_and_pickles_refused(tmp_path):
    save_file(tiny(), tmp_path / "net.safetensors")
    (tmp_path / "other.pth").write_bytes(b"\x80")
    assert find_upscaler_file(str(tmp_path)) == tmp_path / "net.safetensors"
    with pytest.raises(CheckpointError, match=r"is a pickle.*params_ema"):
        find_upscaler_file(str(tmp_path / "other.pth"))
    save_file(tiny(), tmp_path / "second.safetensors")
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files"):
        find_upscaler_file(str(tmp_path))
    with pytest.raises(CheckpointError, match="no upscaler at"):
        find_upscaler_file(str(tmp_path / "none.safetensors"))
