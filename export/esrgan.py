"""RRDBNet, the network of ESRGAN upscalers, and the layouts that its weights come in.

Wang et al. 2018, "ESRGAN" (arXiv:1809.00219), fig. 4, and Wang et al. 2021, "Real-ESRGAN"
(arXiv:2107.10833). Knows tensors and names; not files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.errors import CheckpointError

RESIDUAL_SCALE, SLOPE = 0.2, 0.2
MAX_BLOCKS, MAX_CHANNELS = 64, 512
COLOURS = 3
WRAPPERS = ("params_ema.", "params.", "state_dict.", "module.")
# Names of other releases' layers, and those of Real-ESRGAN's, which are the module's.
RENAMED = {
    "trunk_conv": "conv_body",
    "upconv1": "conv_up1",
    "upconv2": "conv_up2",
    "HRconv": "conv_hr",
}


@dataclass(frozen=True, slots=True)
class RrdbConfig:
    """The sizes of a network.

    Attributes:
        channels: Of the features.
        growth: Channels that each layer of a dense block adds.
        num_blocks: Residual-in-residual blocks.
        num_doublings: Upsampling layers, each by 2.
        shuffle: Pixels of a side that are put into channels first.
    """

    channels: int
    growth: int
    num_blocks: int
    num_doublings: int
    shuffle: int = 1

    @property
    def scale(self) -> int:
        """Of a side of the image."""
        return int(2**self.num_doublings // self.shuffle)


class DenseBlock(nn.Module):
    """Five convolutions, each over everything before it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i + 1}", _conv(channels + i * growth, growth))
        self.conv5 = _conv(channels + 4 * growth, channels)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for i in range(4):
            features.append(_leaky(getattr(self, f"conv{i + 1}")(torch.cat(features, 1))))
        out: Tensor = self.conv5(torch.cat(features, 1))
        return x + RESIDUAL_SCALE * out


class Rrdb(nn.Module):
    """A residual block of three dense blocks."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(channels, growth)
        self.rdb2 = DenseBlock(channels, growth)
        self.rdb3 = DenseBlock(channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rdb3(self.rdb2(self.rdb1(x)))
        return x + RESIDUAL_SCALE * out


class RrdbNet(nn.Module):
    """image [B, 3, H, W] -> [B, 3, scale * H, scale * W], both in [0, 1]."""

    def __init__(self, config: RrdbConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.conv_first = _conv(COLOURS * config.shuffle**2, channels)
        self.body = nn.Sequential(
            *(Rrdb(channels, config.growth) for _ in range(config.num_blocks))
        )
        self.conv_body = _conv(channels, channels)
        for i in range(config.num_doublings):
            setattr(self, f"conv_up{i + 1}", _conv(channels, channels))
        self.conv_hr = _conv(channels, channels)
        self.conv_last = _conv(channels, COLOURS)

    def forward(self, image: Tensor) -> Tensor:
        x = _unshuffle_pixels(image, self.config.shuffle) if self.config.shuffle > 1 else image
        first = self.conv_first(x)
        x = first + self.conv_body(self.body(first))
        for i in range(self.config.num_doublings):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = _leaky(getattr(self, f"conv_up{i + 1}")(x))
        out: Tensor = self.conv_last(_leaky(self.conv_hr(x)))
        return out


def _unshuffle_pixels(image: Tensor, side: int) -> Tensor:
    """`pixel_unshuffle` as a convolution, which ties no dynamic side to a multiple."""
    kernel = torch.eye(side * side, dtype=image.dtype).reshape(side * side, 1, side, side)
    return F.conv2d(image, kernel.repeat(COLOURS, 1, 1, 1), stride=side, groups=COLOURS)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def load_rrdb(weights: Mapping[str, Tensor], where: str) -> RrdbNet:
    """The network of weights in any layout.

    Args:
        weights: As a file has them.
        where: The file, for messages.

    Raises:
        CheckpointError: They are not those of an RRDBNet of images in colour.
    """
    named = rename_weights(weights)
    if "conv_first.weight" not in named or "body.0.rdb1.conv1.weight" not in named:
        raise CheckpointError(
            f"{where} is not an ESRGAN upscaler: it begins with {next(iter(weights), 'nothing')!r}",
            hint="RRDBNet weights of ESRGAN and Real-ESRGAN are supported",
        )
    config = _read_config(named, where)
    with torch.device("meta"):
        net = RrdbNet(config)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in named.items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise CheckpointError(
                f"{where} does not fit an RRDBNet of {config.num_blocks} blocks: {name} has shape "
                f"{actual.get(name)}; expected {expected.get(name)}"
            )
    net.load_state_dict({name: tensor.float() for name, tensor in named.items()}, assign=True)
    return net.eval()


def rename_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the module's names, from those of Real-ESRGAN, of ESRGAN's second release
    and of its first, which numbers its layers.
    """
    wrapper = next((w for w in WRAPPERS if all(name.startswith(w) for name in weights)), "")
    bare = {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
    if "model.0.weight" in bare:
        return _rename_numbered(bare)
    renamed = {}
    for name, tensor in bare.items():
        layer, _, rest = name.partition(".")
        name = name.replace("RRDB_trunk.", "body.", 1).replace(".RDB", ".rdb")
        renamed[f"{RENAMED[layer]}.{rest}" if layer in RENAMED else name] = tensor
    return renamed


def _rename_numbered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`model.0` is the first layer, `model.1.sub` the blocks and the layer after them; of the rest
    the last two are `conv_hr` and `conv_last`.
    """
    tail = sorted({int(m[1]) for name in weights if (m := re.match(r"model\.(\d+)\.w", name))})[1:]
    subs = [int(m[1]) for name in weights if (m := re.match(r"model\.1\.sub\.(\d+)\.", name))]
    layers = {"model.0": "conv_first", f"model.1.sub.{max(subs, default=0)}": "conv_body"}
    layers |= {f"model.{n}": f"conv_up{i + 1}" for i, n in enumerate(tail[:-2])}
    layers |= dict(zip((f"model.{n}" for n in tail[-2:]), ("conv_hr", "conv_last"), strict=False))
    renamed = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0", layer)
        if block:
            layer = "body.{}.rdb{}.conv{}".format(*block.groups())
        renamed[f"{layers.get(layer, layer)}.{kind}"] = tensor
    return renamed


def _read_config(weights: Mapping[str, Tensor], where: str) -> RrdbConfig:
    first, growth = weights["conv_first.weight"], weights["body.0.rdb1.conv1.weight"]
    blocks = {int(m[1]) for name in weights if (m := re.match(r"body\.(\d{1,3})\.rdb", name))}
    doublings = sum(re.fullmatch(r"conv_up\d\.weight", name) is not None for name in weights)
    if first.ndim != 4 or growth.ndim != 4:
        raise CheckpointError(f"{where} is not an ESRGAN upscaler: conv_first is no convolution")
    channels, inputs = first.shape[:2]
    shuffle = {COLOURS: 1, COLOURS * 4: 2}.get(inputs)
    if shuffle is None:
        raise CheckpointError(
            f"{where} reads images of {inputs} channels; expected {COLOURS}, or {COLOURS * 4} "
            "where it puts pixels into channels"
        )
    config = RrdbConfig(int(channels), len(growth), len(blocks), doublings, shuffle)
    if max(config.channels, config.growth) > MAX_CHANNELS or config.num_blocks > MAX_BLOCKS:
        raise CheckpointError(f"{where} is larger than any ESRGAN upscaler: {config}")
    if config.scale < 2:
        raise CheckpointError(f"{where} has scale {config.scale}; expected 2 or more")
    return config
