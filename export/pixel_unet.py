"""`UNet2DModel` as published for unconditional generation: no prompt, no latents.

Knows its configuration and torch. Stages attend over positions only, where the configuration has
them do so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.errors import CheckpointError

from .config import read_config
from .layers import Downsample, ResnetBlock, SpatialAttention, Upsample, timestep_embedding
from .unet import TimeEmbedding, up_widths

KNOWN_BLOCKS = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}


@dataclass(frozen=True, slots=True)
class PixelUnetConfig:
    """What of `config.json` shapes the network.

    `attention_head_dim` is the channels of one head, None for a single head. `sample_size` is the
    image's side, or height and width.
    """

    in_channels: int = 3
    out_channels: int = 3
    sample_size: int | tuple[int, int] = 256
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    attention_head_dim: int | None = 8
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    add_attention: bool = True
    mid_block_type: str | None = "UNetMidBlock2D"

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "PixelUnetConfig":
        """Raises CheckpointError for what this network does not have."""
        fixed = {
            **dict.fromkeys(("attn_norm_num_groups", "class_embed_type", "num_class_embeds")),
            "act_fn": "silu",
            "center_input_sample": False,
            "downsample_type": "conv",
            "mid_block_scale_factor": 1,
            "resnet_time_scale_shift": "default",
            "time_embedding_dim": None,
            "time_embedding_type": "positional",
            "upsample_type": "conv",
        }
        config = read_config(cls, raw, fixed=fixed, ignored=("num_train_timesteps",))
        known = {*KNOWN_BLOCKS, "UNetMidBlock2D", None}
        for kind in (*config.down_block_types, *config.up_block_types, config.mid_block_type):
            if kind not in known:
                raise CheckpointError(f"{cls.__name__}: a block of type {kind!r} is not known here")
        if config.in_channels not in (1, 3) or config.out_channels != config.in_channels:
            raise CheckpointError(
                f"{cls.__name__}: {config.in_channels} channels in and {config.out_channels} out; "
                "expected 3 of colour or 1 of grey"
            )
        return config

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        sides = self.sample_size
        return (sides, sides) if isinstance(sides, int) else (sides[1], sides[0])

    def resnet(self, channels_in: int, channels_out: int) -> ResnetBlock:
        return ResnetBlock(
            channels_in,
            channels_out,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            time=self.block_out_channels[0] * 4,
        )

    def attention(self, channels: int) -> SpatialAttention:
        heads = channels // (self.attention_head_dim or channels)
        return SpatialAttention(
            channels, heads=heads, groups=self.norm_num_groups, eps=self.norm_eps
        )


class PixelStage(nn.Module):
    """One resolution, down or up: residual blocks, each followed by attention where it attends."""

    def __init__(
        self, config: PixelUnetConfig, inputs: list[int], channels: int, *, attends: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(config.resnet(width, channels) for width in inputs)
        self.attentions = nn.ModuleList(config.attention(channels) for _ in inputs if attends)

    def layer(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x) if self.attentions else x


class PixelDownStage(PixelStage):
    """Returns its output and what the way up will be handed."""

    def __init__(self, config: PixelUnetConfig, stage: int) -> None:
        widths = config.block_out_channels
        before, channels = widths[max(stage - 1, 0)], widths[stage]
        inputs = [before, *[channels] * (config.layers_per_block - 1)]
        attends = config.down_block_types[stage].startswith("Attn")
        super().__init__(config, inputs, channels, attends=attends)
        half = Downsample(channels, symmetric=config.downsample_padding == 1)
        self.downsamplers = None if stage == len(widths) - 1 else nn.ModuleList([half])

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time)
            skips.append(x)
        for change in self.downsamplers or ():
            x = change(x)
            skips.append(x)
        return x, skips


class PixelMiddle(nn.Module):
    """Residual block, attention if there is any, residual block at the lowest resolution."""

    def __init__(self, config: PixelUnetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(config.resnet(channels, channels) for _ in range(2))
        attention = [config.attention(channels)] if config.add_attention else []
        self.attentions = nn.ModuleList(attention)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, time)


class PixelUpStage(PixelStage):
    """Takes its skips off the end of the list it is given."""

    def __init__(self, config: PixelUnetConfig, inputs: list[int], index: int) -> None:
        channels = config.block_out_channels[-1 - index]
        attends = config.up_block_types[index].startswith("Attn")
        super().__init__(config, inputs, channels, attends=attends)
        last = index == len(config.block_out_channels) - 1
        self.upsamplers = None if last else nn.ModuleList([Upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), time)
        for change in self.upsamplers or ():
            x = change(x)
        return x


class PixelUnet(nn.Module):
    """sample [B, C, H, W], timestep [B] float32 -> [B, C, H, W]."""

    def __init__(self, config: PixelUnetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], widths[0] * 4)
        self.down_blocks = nn.ModuleList(PixelDownStage(config, i) for i in range(len(widths)))
        self.mid_block = PixelMiddle(config) if config.mid_block_type else None
        table = up_widths(widths, config.layers_per_block)
        self.up_blocks = nn.ModuleList(
            PixelUpStage(config, inputs, i) for i, inputs in enumerate(table)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        features = timestep_embedding(
            timestep,
            self.config.block_out_channels[0],
            cosines_first=self.config.flip_sin_to_cos,
            shift=self.config.freq_shift,
        )
        time = self.time_embedding(features.to(sample.dtype))  # [B, time channels]
        x = self.conv_in(sample)
        skips = [x]
        for down in self.down_blocks:
            x, outputs = down(x, time)
            skips += outputs
        if self.mid_block is not None:
            x = self.mid_block(x, time)
        for up in self.up_blocks:
            x = up(x, skips, time)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
