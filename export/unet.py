"""`UNet2DConditionModel` as published for Stable Diffusion 1.x, 2.x and XL: one evaluation.

Knows its configuration and torch. The batch axis is plain rows: guidance is not baked in.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.bundle.manifest import (
    ADAPTER_STATE,
    DOWN_RESIDUAL,
    IP_ADAPTER_KV,
    IP_ADAPTER_SCALE,
    MID_RESIDUAL,
)

from .layers import Downsample, Upsample, timestep_embedding
from .unet_config import UnetConfig

RESIDUALS = (DOWN_RESIDUAL, MID_RESIDUAL, ADAPTER_STATE)


class DownStage(nn.Module):
    """One resolution on the way down; returns its output and what the way up will be handed.

    A T2I-Adapter's map is added after its last layer where it attends, else to its output.
    """

    def __init__(self, config: UnetConfig, stage: int) -> None:
        super().__init__()
        widths, layers = config.block_out_channels, config.layers_per_block
        before, channels = widths[max(stage - 1, 0)], widths[stage]
        attends = config.down_block_types[stage].startswith("CrossAttn")
        self.resnets = nn.ModuleList(
            config.resnet(before if i == 0 else channels, channels) for i in range(layers)
        )
        depths = config.depths(stage, layers) if attends else []
        self.attentions = nn.ModuleList(config.transformer(stage, depth) for depth in depths)
        last = stage == len(widths) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(channels, symmetric=True)])

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        skips = self.layers(x, time, context, len(self.resnets))
        if state is not None and self.attentions:
            skips[-1] = skips[-1] + state
        for change in self.downsamplers or ():
            skips.append(change(skips[-1]))
        if state is not None and not self.attentions:
            skips[-1] = skips[-1] + state
        return skips[-1], skips

    def layers(self, x: Tensor, time: Tensor, context: Tensor, count: int) -> list[Tensor]:
        """What each of the first layers puts out."""
        result = []
        for i, resnet in enumerate(self.resnets[:count]):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            result.append(x)
        return result


class MidStage(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution; or the first alone."""

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        stage = len(config.block_out_channels) - 1
        channels = config.block_out_channels[stage]
        attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = nn.ModuleList(config.resnet(channels, channels) for _ in range(1 + attends))
        depths = config.depths(stage, 1) if attends else []
        self.attentions = nn.ModuleList(config.transformer(stage, depth) for depth in depths)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, context), time)
        return x


class UpStage(nn.Module):
    """One resolution on the way up; takes its skips off the end of the list it is given."""

    def __init__(self, config: UnetConfig, inputs: list[int], index: int) -> None:
        super().__init__()
        stage = len(config.block_out_channels) - 1 - index  # of the way down
        channels = config.block_out_channels[stage]
        attends = config.up_block_types[index].startswith("CrossAttn")
        self.resnets = nn.ModuleList(config.resnet(width, channels) for width in inputs)
        depths = config.depths(stage, len(inputs), up=True) if attends else []
        self.attentions = nn.ModuleList(config.transformer(stage, depth) for depth in depths)
        self.upsamplers = None if stage == 0 else nn.ModuleList([Upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        x = self.layers(x, skips, time, context, slice(None))
        for change in self.upsamplers or ():
            x = change(x)
        return x

    def layers(
        self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor, which: slice
    ) -> Tensor:
        """Some of its layers, one after the other."""
        for i in range(len(self.resnets))[which]:
            x = self.resnets[i](torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        return x


class TimeEmbedding(nn.Module):
    """Sinusoids, with a condition added to them where there is one, through two linear layers."""

    def __init__(self, channels: int, width: int, condition: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)
        self.cond_proj = nn.Linear(condition, channels, bias=False) if condition else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(x)))


class UnetEncoder(nn.Module):
    """What a ControlNet copies of a UNet: the way down and the middle."""

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(
            widths[0], config.time_channels, config.time_cond_proj_dim
        )
        added = config.projection_class_embeddings_input_dim
        self.add_embedding = TimeEmbedding(added, config.time_channels) if added else None
        self.down_blocks = nn.ModuleList(DownStage(config, i) for i in range(len(widths)))
        self.mid_block = MidStage(config) if config.mid_block_type else None

    def embed_time(
        self,
        sample: Tensor,
        timestep: Tensor,
        pooled: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """The conditioning of every residual block, [B, time_channels]."""
        features = timestep_embedding(timestep, self.config.block_out_channels[0])
        time: Tensor = self.time_embedding(features.to(sample.dtype), timestep_cond)
        if self.add_embedding is not None and pooled is not None and time_ids is not None:
            item = timestep_embedding(time_ids.flatten(), self.config.addition_time_embed_dim or 0)
            reported = item.unflatten(0, (-1, self.config.num_time_ids)).flatten(1).to(sample.dtype)
            time = time + self.add_embedding(torch.cat([pooled, reported], dim=-1))
        return time


class Unet(UnetEncoder):
    """sample [B, in, H, W], timestep [B] float32, context [B, M, K] -> [B, out, H, W].

    pooled [B, pooled_width] and time_ids [B, num_time_ids] float32 where the configuration adds
    them: the prompt as a whole, and the sizes of Podell et al. 2023 (arXiv:2307.01952), section
    2.2, in a refiner with an aesthetic score.
    timestep_cond [B, time_cond_proj_dim] where the configuration has it: the guidance scale, Luo et
    al. 2023 (arXiv:2310.04378), section 4.2.

    With a `branch` also what the layers below it made, feature [B, C, H, W]: what comes from below
    where the skip of that number, from 0, is added (Ma et al. 2023, arXiv:2312.00858, section 3.2).
    """

    def __init__(self, config: UnetConfig) -> None:
        super().__init__(config)
        self.branch: int | None = None
        widths = config.block_out_channels
        self.up_blocks = nn.ModuleList(
            UpStage(config, inputs, i)
            for i, inputs in enumerate(up_widths(widths, config.layers_per_block))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        residuals: Mapping[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        residuals = residuals or {}
        states = [residuals.get(f"{ADAPTER_STATE}_{i}") for i in range(len(self.down_blocks) + 1)]
        time = self.embed_time(sample, timestep, pooled, time_ids, timestep_cond)
        x = self.conv_in(sample)
        skips = [x]
        for down, state in zip(self.down_blocks, states, strict=False):
            x, result = down(x, time, context, state)
            skips += result
        if self.mid_block is not None:
            x = _sum(self.mid_block(x, time, context), states[-1])
        skips = [_sum(skip, residuals.get(f"{DOWN_RESIDUAL}_{i}")) for i, skip in enumerate(skips)]
        x = _sum(x, residuals.get(MID_RESIDUAL))
        for up in self.up_blocks[:-1]:
            x = up(x, skips, time, context)
        last: Any = self.up_blocks[-1]
        if self.branch is None:
            return self._out(last(x, skips, time, context))
        below = self.config.layers_per_block - self.branch
        feature = last.layers(x, skips, time, context, slice(below))
        return self._out(last.layers(feature, skips, time, context, slice(below, None))), feature

    def controlled(
        self,
        ip_adapter_kv: Tensor | None = None,
        ip_adapter_scale: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output with the residuals of a ControlNet and of a T2I-Adapter among the inputs: at
        skips and the middle (Zhang et al. 2023, arXiv:2302.05543), within the way down (Mou et al.
        2023, arXiv:2302.08453); and with cross-attention to an image's tokens as well (Ye et al.
        2023, arXiv:2308.06721).

        ip_adapter_kv [B, T, 2 * channels of all layers], ip_adapter_scale [B, layers]
        """
        residuals = {name: x for name, x in inputs.items() if name.startswith(RESIDUALS)}
        plain = {name: x for name, x in inputs.items() if name not in residuals}
        if ip_adapter_kv is not None and ip_adapter_scale is not None:
            self._set_image_prompt(ip_adapter_kv, ip_adapter_scale)
        output: Tensor | tuple[Tensor, Tensor] = self(**plain, residuals=residuals)
        for layer in self.cross_attentions:
            layer.image_prompt = None
        return output

    def ip_adapter_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Of the inputs of an IP-Adapter by name; none without cross-attention."""
        widths = [2 * layer.to_k.out_features for layer in self.cross_attentions]
        shapes = {IP_ADAPTER_KV: (tokens, sum(widths)), IP_ADAPTER_SCALE: (len(widths),)}
        return shapes if widths else {}

    @property
    def cross_attentions(self) -> list[Any]:
        """Every cross-attention layer in the order of IP-Adapter's files: the middle is last."""
        parts = [part for part in (self.down_blocks, self.up_blocks, self.mid_block) if part]
        return [m for part in parts for name, m in part.named_modules() if name.endswith("attn2")]

    def _set_image_prompt(self, keys_values: Tensor, scales: Tensor) -> None:
        layers = self.cross_attentions
        widths = [layer.to_k.out_features for layer in layers for _ in range(2)]
        split = keys_values.split(widths, dim=-1)
        for i, layer in enumerate(layers):
            keys, values = (
                t.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for t in split[2 * i : 2 * i + 2]
            )
            layer.image_prompt = keys, values, scales[:, i, None, None, None]

    def shallow(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        feature: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """The output with the feature of an earlier evaluation in place of what lies below the
        branch, which is not computed.
        """
        branch = self.branch or 0
        time = self.embed_time(sample, timestep, pooled, time_ids, timestep_cond)
        first: Any = self.down_blocks[0]
        last: Any = self.up_blocks[-1]
        x = self.conv_in(sample)
        skips = [x, *first.layers(x, time, context, branch)]
        above = slice(self.config.layers_per_block - branch, None)
        return self._out(last.layers(feature, skips, time, context, above))

    def _out(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def up_widths(widths: tuple[int, ...], layers: int) -> list[list[int]]:
    """Input channels of every residual block on the way up: what comes from below plus its skip.

    widths: of the stages on the way down. layers: residual blocks of each
    """
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
