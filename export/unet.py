"""`UNet2DConditionModel` as published for Stable Diffusion 1.x: one denoising evaluation.

Knows its configuration and torch. The batch axis is plain rows: guidance is not baked in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import read_config
from .layers import Downsample, ResnetBlock, SpatialTransformer, Upsample, timestep_embedding


@dataclass(frozen=True, slots=True)
class UnetConfig:
    """What of `unet/config.json` shapes the network.

    `attention_head_dim` is the number of heads: a published misnomer that files keep.
    """

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    attention_head_dim: int = 8

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "UnetConfig":
        """Raises CheckpointError for what this network does not have."""
        absent = (
            *("addition_embed_type", "addition_time_embed_dim", "class_embed_type"),
            *("encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads"),
            *("num_class_embeds", "projection_class_embeddings_input_dim", "time_cond_proj_dim"),
            *("time_embedding_act_fn", "time_embedding_dim", "timestep_post_act"),
            *("cross_attention_norm", "reverse_transformer_layers_per_block"),
        )
        off = (
            *("class_embeddings_concat", "dual_cross_attention", "use_linear_projection"),
            *("only_cross_attention", "resnet_skip_time_act"),
        )
        fixed = {
            **dict.fromkeys(absent),
            **dict.fromkeys(off, False),
            "act_fn": "silu",
            "attention_type": "default",
            "center_input_sample": False,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "downsample_padding": 1,
            "dropout": 0.0,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "mid_block_only_cross_attention": None,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "resnet_out_scale_factor": 1.0,
            "resnet_time_scale_shift": "default",
            "time_embedding_type": "positional",
            "transformer_layers_per_block": 1,
            "addition_embed_type_num_heads": 64,
            "upcast_attention": False,
        }
        return read_config(cls, raw, fixed=fixed)

    @property
    def time_channels(self) -> int:
        return self.block_out_channels[0] * 4

    def resnet(self, channels_in: int, channels_out: int) -> ResnetBlock:
        return ResnetBlock(
            channels_in,
            channels_out,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            time=self.time_channels,
        )

    def transformer(self, channels: int) -> SpatialTransformer:
        return SpatialTransformer(
            channels,
            self.attention_head_dim,
            context=self.cross_attention_dim,
            groups=self.norm_num_groups,
        )


class DownStage(nn.Module):
    """One resolution on the way down; returns its output and what the way up will be handed."""

    def __init__(
        self, config: UnetConfig, channels_in: int, channels: int, *, attends: bool, last: bool
    ) -> None:
        super().__init__()
        layers = range(config.layers_per_block)
        self.resnets = nn.ModuleList(
            config.resnet(channels_in if i == 0 else channels, channels) for i in layers
        )
        self.attentions = nn.ModuleList(config.transformer(channels) for _ in layers if attends)
        self.downsamplers = None if last else nn.ModuleList([Downsample(channels, symmetric=True)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for change in self.downsamplers or ():
            x = change(x)
            skips.append(x)
        return x, skips


class MidStage(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(config.resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([config.transformer(channels)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpStage(nn.Module):
    """One resolution on the way up; takes its skips off the end of the list it is given."""

    def __init__(
        self, config: UnetConfig, inputs: list[int], channels: int, *, attends: bool, last: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(config.resnet(width, channels) for width in inputs)
        self.attentions = nn.ModuleList(config.transformer(channels) for _ in inputs if attends)
        self.upsamplers = None if last else nn.ModuleList([Upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        for change in self.upsamplers or ():
            x = change(x)
        return x


class TimeEmbedding(nn.Module):
    """Sinusoids through two linear layers."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Unet(nn.Module):
    """sample [B, in, H, W], timestep [B] float32, context [B, M, K] -> [B, out, H, W]."""

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], config.time_channels)
        self.down_blocks = nn.ModuleList(
            DownStage(
                config,
                widths[max(i - 1, 0)],
                width,
                attends=config.down_block_types[i].startswith("CrossAttn"),
                last=i == len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidStage(config)
        self.up_blocks = nn.ModuleList(
            UpStage(
                config,
                inputs,
                widths[-1 - i],
                attends=config.up_block_types[i].startswith("CrossAttn"),
                last=i == len(widths) - 1,
            )
            for i, inputs in enumerate(up_widths(config))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        features = timestep_embedding(timestep, self.config.block_out_channels[0])
        time = self.time_embedding(features.to(sample.dtype))  # [B, time_channels]
        x = self.conv_in(sample)
        skips = [x]
        for down in self.down_blocks:
            x, made = down(x, time, context)
            skips += made
        x = self.mid_block(x, time, context)
        for up in self.up_blocks:
            x = up(x, skips, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def up_widths(config: UnetConfig) -> list[list[int]]:
    """Input channels of every residual block on the way up: what comes from below plus its skip."""
    widths, layers = config.block_out_channels, config.layers_per_block
    skips = [widths[0]]
    for i, width in enumerate(widths):
        skips += [width] * (layers + (i < len(widths) - 1))
    below, table = widths[-1], []
    for width in reversed(widths):
        row = []
        for _ in range(layers + 1):
            row.append(below + skips.pop())
            below = width
        table.append(row)
    return table
