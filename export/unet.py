"""`UNet2DConditionModel` as published for Stable Diffusion 1.x and 2.x: one denoising evaluation.

Knows its configuration and torch. The batch axis is plain rows: guidance is not baked in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.errors import CheckpointError

from .config import read_config
from .layers import Downsample, ResnetBlock, SpatialTransformer, Upsample, timestep_embedding


@dataclass(frozen=True, slots=True)
class UnetConfig:
    """What of `unet/config.json` shapes the network.

    `attention_head_dim` is the number of heads, one for all stages or each its own: a published
    misnomer that files keep. `in_channels` is 4, 9 with a mask and what it leaves of a picture, 5
    with a depth map. `mid_block_type` is None in models distilled without one.
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
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    upcast_attention: bool = False
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"

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
            *("class_embeddings_concat", "dual_cross_attention", "only_cross_attention"),
            "resnet_skip_time_act",
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
            "resnet_out_scale_factor": 1.0,
            "resnet_time_scale_shift": "default",
            "time_embedding_type": "positional",
            "addition_embed_type_num_heads": 64,
        }
        config = read_config(cls, raw, fixed=fixed)
        known: set[str | None] = {"CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", None}
        known |= {"CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"}
        for kind in (*config.down_block_types, *config.up_block_types, config.mid_block_type):
            if kind not in known:
                raise CheckpointError(f"{cls.__name__}: a block of type {kind!r} is not known here")
        return config

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

    def transformer(self, stage: int) -> SpatialTransformer:
        """The transformer of a stage on the way down, counted from the first."""
        return SpatialTransformer(
            self.block_out_channels[stage],
            _of_stage(self.attention_head_dim, stage),
            context=self.cross_attention_dim,
            groups=self.norm_num_groups,
            depth=_of_stage(self.transformer_layers_per_block, stage),
            linear=self.use_linear_projection,
            upcast=self.upcast_attention,
        )


def _of_stage(value: int | tuple[int, ...], stage: int) -> int:
    return value if isinstance(value, int) else value[stage]


class DownStage(nn.Module):
    """One resolution on the way down; returns its output and what the way up will be handed."""

    def __init__(self, config: UnetConfig, stage: int) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, range(config.layers_per_block)
        before, channels = widths[max(stage - 1, 0)], widths[stage]
        attends = config.down_block_types[stage].startswith("CrossAttn")
        self.resnets = nn.ModuleList(
            config.resnet(before if i == 0 else channels, channels) for i in layers
        )
        self.attentions = nn.ModuleList(config.transformer(stage) for _ in layers if attends)
        last = stage == len(widths) - 1
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
        stage = len(config.block_out_channels) - 1
        channels = config.block_out_channels[stage]
        self.resnets = nn.ModuleList(config.resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([config.transformer(stage)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpStage(nn.Module):
    """One resolution on the way up; takes its skips off the end of the list it is given."""

    def __init__(self, config: UnetConfig, inputs: list[int], index: int) -> None:
        super().__init__()
        stage = len(config.block_out_channels) - 1 - index  # of the way down
        channels = config.block_out_channels[stage]
        attends = config.up_block_types[index].startswith("CrossAttn")
        self.resnets = nn.ModuleList(config.resnet(width, channels) for width in inputs)
        self.attentions = nn.ModuleList(config.transformer(stage) for _ in inputs if attends)
        self.upsamplers = None if stage == 0 else nn.ModuleList([Upsample(channels)])

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
        self.down_blocks = nn.ModuleList(DownStage(config, i) for i in range(len(widths)))
        self.mid_block = MidStage(config) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList(
            UpStage(config, inputs, i) for i, inputs in enumerate(up_widths(config))
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
        if self.mid_block is not None:
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
