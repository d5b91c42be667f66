"""`T2IAdapter` as published for Stable Diffusion 1.x, 2.x and XL: feature maps of a control image.

Knows its configuration and torch. Mou et al. 2023, arXiv:2302.08453.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.errors import CheckpointError

from .config import read_config

FULL, XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow makes grey of RGB
RGB = 3


@dataclass(frozen=True, slots=True)
class T2IAdapterConfig:
    """What of an adapter's `config.json` shapes the network.

    Attributes:
        in_channels: Of the control image: 3, or 1 for grey.
        channels: Of the maps, one of each resolution.
        num_res_blocks: Residual blocks before each map.
        downscale_factor: Pixels along one side of the first map's positions.
        adapter_type: `full_adapter`, `full_adapter_xl` or `light_adapter`.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = FULL

    @property
    def num_maps(self) -> int:
        """A light adapter repeats its last width at half the resolution."""
        return len(self.channels) + (self.adapter_type == LIGHT)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "T2IAdapterConfig":
        """Raises CheckpointError for what this network does not have."""
        config = read_config(cls, raw, fixed={})
        for name, value, expected in (
            ("adapter_type", config.adapter_type, (FULL, XL, LIGHT)),
            ("in_channels", config.in_channels, (1, RGB)),
        ):
            if value not in expected:
                raise CheckpointError(
                    f"{cls.__name__}: {name}={value!r} is not supported; expected "
                    f"{' or '.join(map(str, expected))}"
                )
        return config


class AdapterResnet(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.block2(F.relu(self.block1(x)))
        return hidden + x


class AdapterStage(nn.Module):
    """One map: where it halves the resolution first, by the mean of 2x2 positions."""

    def __init__(self, before: int, channels: int, blocks: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.in_conv = nn.Conv2d(before, channels, 1) if before != channels else None
        self.resnets = nn.Sequential(*(AdapterResnet(channels, 1) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2) if self.halves else x
        result: Tensor = self.resnets(x if self.in_conv is None else self.in_conv(x))
        return result


class LightAdapterStage(nn.Module):
    """The same with its residual blocks at a quarter of the channels.

    in_conv: of an image where it is the first, else of the map before
    """

    def __init__(self, in_conv: nn.Conv2d, channels: int, blocks: int, halves: bool) -> None:
        super().__init__()
        self.halves, self.in_conv = halves, in_conv
        inner = channels // 4
        self.resnets = nn.Sequential(*(AdapterResnet(inner, 3) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2) if self.halves else x
        result: Tensor = self.out_conv(self.resnets(self.in_conv(x)))
        return result


class Adapter(nn.Module):
    """What the published weights call `adapter`."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        widths, blocks, factor = config.channels, config.num_res_blocks, config.downscale_factor
        if config.adapter_type == LIGHT:
            self.conv_in = None
            widths = (*widths, widths[-1])
            stages = []
            for i, width in enumerate(widths):
                inner = width // 4
                first = nn.Conv2d(RGB, inner, factor, stride=factor)
                later = nn.Conv2d(widths[max(i - 1, 0)], inner, 1)
                stages.append(LightAdapterStage(later if i else first, width, blocks, i > 0))
            self.body = nn.ModuleList(stages)
            return
        self.conv_in = nn.Conv2d(RGB, widths[0], 3 * factor, stride=factor, padding=factor)
        halving = (2,) if config.adapter_type == XL else range(1, len(widths))
        self.body = nn.ModuleList(
            AdapterStage(widths[max(i - 1, 0)], width, blocks, i in halving)
            for i, width in enumerate(widths)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x if self.conv_in is None else self.conv_in(x)
        maps = []
        for stage in self.body:
            x = stage(x)
            maps.append(x)
        return tuple(maps)


class T2IAdapter(nn.Module):
    """control_image [B, 3, H, W] float in 0..1 -> maps [B, C, h, w], the largest first, which are
    added within the UNet's way down. Sides are multiples of the base model's.
    """

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = Adapter(config)

    def forward(self, control_image: Tensor) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = self.adapter(control_image)
        return maps


def unfolded_weights(weights: Mapping[str, Tensor], config: T2IAdapterConfig) -> dict[str, Tensor]:
    """The weights with the first convolution applied to the image itself, in RGB: published ones
    apply it to the image's blocks as channels (pixel unshuffle). A convolution of blocks is one
    of pixels with a stride, which no side has to be divided for.
    """
    name = "adapter.body.0.in_conv" if config.adapter_type == LIGHT else "adapter.conv_in"
    factor = config.downscale_factor
    folded = weights.get(f"{name}.weight")
    channels = config.in_channels * factor**2
    if folded is None or folded.ndim != 4 or folded.shape[1] != channels:
        return dict(weights)  # loading says what does not fit
    rows, columns = folded.shape[2:]
    blocks = folded.unflatten(1, (config.in_channels, factor, factor))  # [out, in, i, j, y, x]
    pixels = blocks.permute(0, 1, 4, 2, 5, 3).reshape(
        len(folded), config.in_channels, rows * factor, columns * factor
    )
    if config.in_channels == 1:
        pixels = pixels.float() * torch.tensor(LUMA)[:, None, None]
    return {**weights, f"{name}.weight": pixels.contiguous()}
