"""`UNet2DConditionModel` as published for Stable Diffusion 1.x, 2.x and XL: one evaluation.

Knows its configuration and torch. The batch axis is plain rows: guidance is not baked in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.bundle.manifest import ADAPTER_STATE, DOWN_RESIDUAL, MID_RESIDUAL
from sdrt.errors import CheckpointError

from .config import read_config
from .layers import Downsample, ResnetBlock, SpatialTransformer, Upsample, timestep_embedding

RESIDUALS = (DOWN_RESIDUAL, MID_RESIDUAL, ADAPTER_STATE)
TIME_IDS = 6  # the original's height and width, the crop's top and left, the target's both
# One for all stages; one for each; or one for each transformer of each stage.
Depths = int | tuple[int | tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class UnetConfig:
    """What of `unet/config.json` shapes the network.

    `attention_head_dim` is the number of heads, one for all stages or each its own: a published
    misnomer that files keep. `sample_size` is the side of latents, or height and width, or not
    known. `in_channels` is 4, 9 with a mask and what it leaves of an image, 5
    with a depth map. `mid_block_type` is None in models distilled without one, and UNetMidBlock2D
    is a residual block alone. `transformer_layers_per_block` counts on the way down, and on the way
    up unless `reverse_transformer_layers_per_block` does. `addition_embed_type` is text_time in
    models that are also conditioned on the pooled prompt and on sizes. `time_cond_proj_dim` is the
    width of the guidance scale's embedding in models that take one, which are distilled from guided
    ones.
    """

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] | None = 64
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None
    use_linear_projection: bool = False
    upcast_attention: bool = False
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "UnetConfig":
        """Raises CheckpointError for what this network does not have."""
        absent = (
            *("class_embed_type", "cross_attention_norm", "encoder_hid_dim"),
            *("encoder_hid_dim_type", "num_attention_heads", "num_class_embeds"),
            *("time_embedding_act_fn", "time_embedding_dim", "timestep_post_act"),
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
        known |= {"CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"}
        for kind in (*config.down_block_types, *config.up_block_types, config.mid_block_type):
            if kind not in known:
                raise CheckpointError(f"{cls.__name__}: a block of type {kind!r} is not known here")
        config._check_addition()
        return config

    def _check_addition(self) -> None:
        """Raise CheckpointError unless the added conditioning is none, or the pooled prompt and
        six numbers of sizes.
        """
        kind, item = self.addition_embed_type, self.addition_time_embed_dim
        width = self.projection_class_embeddings_input_dim
        if kind is None and item is None and width is None:
            return
        if kind != "text_time" or not item or not width or width <= TIME_IDS * item:
            raise CheckpointError(
                f"UnetConfig: addition_embed_type={kind!r} with addition_time_embed_dim={item!r} "
                f"and projection_class_embeddings_input_dim={width!r}; expected none of them, or "
                f"text_time with a width beyond {TIME_IDS} times the second"
            )

    @property
    def pooled_width(self) -> int:
        """Width of the pooled prompt that the model is conditioned on; 0 if there is none."""
        item, width = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        return width - TIME_IDS * item if width and item else 0

    @property
    def time_channels(self) -> int:
        return self.block_out_channels[0] * 4

    def skip_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """Channels, height and width of every skip, from latents of this height and width."""
        shapes = [(self.block_out_channels[0], height, width)]
        last = len(self.block_out_channels) - 1
        for stage, channels in enumerate(self.block_out_channels):
            shapes += [(channels, height, width)] * self.layers_per_block
            if stage < last:
                height, width = (height + 1) // 2, (width + 1) // 2
                shapes.append((channels, height, width))
        return shapes

    @property
    def adapter_places(self) -> tuple[int | None, ...]:
        """The skips that a T2I-Adapter's maps are added to, one of each stage; for an XL model also
        None, the middle.
        """
        layers, last = self.layers_per_block, len(self.block_out_channels) - 1
        places: list[int | None] = []
        for stage, kind in enumerate(self.down_block_types):
            downsampled = stage < last and not kind.startswith("CrossAttn")
            places.append(stage * (layers + 1) + layers + downsampled)
        has_middle = self.addition_embed_type is not None and self.mid_block_type is not None
        return (*places, None) if has_middle else tuple(places)

    def residual_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """Of the residual inputs by name, from latents of this height and width."""
        skips = self.skip_shapes(height, width)
        shapes = {f"{DOWN_RESIDUAL}_{i}": shape for i, shape in enumerate(skips)}
        shapes[MID_RESIDUAL] = skips[-1]
        for i, place in enumerate(self.adapter_places):
            shapes[f"{ADAPTER_STATE}_{i}"] = skips[-1 if place is None else place]
        return shapes

    def resnet(self, channels_in: int, channels_out: int) -> ResnetBlock:
        return ResnetBlock(
            channels_in,
            channels_out,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            time=self.time_channels,
        )

    def transformer(self, stage: int, depth: int) -> SpatialTransformer:
        """A transformer of a stage on the way down, counted from the first."""
        return SpatialTransformer(
            self.block_out_channels[stage],
            _of_stage(self.attention_head_dim, stage),
            context=self.cross_attention_dim,
            groups=self.norm_num_groups,
            depth=depth,
            linear=self.use_linear_projection,
            upcast=self.upcast_attention,
        )

    def depths(self, stage: int, count: int, *, up: bool = False) -> list[int]:
        """Blocks of each of a stage's transformers; stages are counted from the first way down."""
        provided, at = self.transformer_layers_per_block, stage
        if up and self.reverse_transformer_layers_per_block is not None:
            provided = self.reverse_transformer_layers_per_block
            at = len(self.block_out_channels) - 1 - stage
        own = _of_stage(provided, at)
        depths = [own] * count if isinstance(own, int) else list(own)
        if len(depths) < count:
            raise CheckpointError(
                f"UnetConfig: a stage has {count} transformers and {len(depths)} depths, {depths}"
            )
        return depths[:count]


def _of_stage(value: Any, stage: int) -> Any:
    return value if isinstance(value, int) else value[stage]


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


class Unet(nn.Module):
    """sample [B, in, H, W], timestep [B] float32, context [B, M, K] -> [B, out, H, W].

    pooled [B, pooled_width] and time_ids [B, 6] float32 where the configuration adds them: the
    prompt as a whole, and the sizes of Podell et al. 2023 (arXiv:2307.01952), section 2.2.
    timestep_cond [B, time_cond_proj_dim] where the configuration has it: the guidance scale, Luo et
    al. 2023 (arXiv:2310.04378), section 4.2.

    With a `branch` also what the layers below it made, feature [B, C, H, W]: what comes from below
    where the skip of that number, from 0, is added (Ma et al. 2023, arXiv:2312.00858, section 3.2).
    """

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self.config = config
        self.branch: int | None = None
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(
            widths[0], config.time_channels, config.time_cond_proj_dim
        )
        added = config.projection_class_embeddings_input_dim
        self.add_embedding = TimeEmbedding(added, config.time_channels) if added else None
        self.down_blocks = nn.ModuleList(DownStage(config, i) for i in range(len(widths)))
        self.mid_block = MidStage(config) if config.mid_block_type else None
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
        time = self._time(sample, timestep, pooled, time_ids, timestep_cond)
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

    def controlled(self, **inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The output with the residuals of a ControlNet and of a T2I-Adapter among the inputs: at
        skips and the middle (Zhang et al. 2023, arXiv:2302.05543), within the way down (Mou et al.
        2023, arXiv:2302.08453).
        """
        residuals = {name: x for name, x in inputs.items() if name.startswith(RESIDUALS)}
        plain = {name: x for name, x in inputs.items() if name not in residuals}
        output: Tensor | tuple[Tensor, Tensor] = self(**plain, residuals=residuals)
        return output

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
        time = self._time(sample, timestep, pooled, time_ids, timestep_cond)
        first: Any = self.down_blocks[0]
        last: Any = self.up_blocks[-1]
        x = self.conv_in(sample)
        skips = [x, *first.layers(x, time, context, branch)]
        above = slice(self.config.layers_per_block - branch, None)
        return self._out(last.layers(feature, skips, time, context, above))

    def _time(
        self,
        sample: Tensor,
        timestep: Tensor,
        pooled: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> Tensor:
        """The conditioning of every residual block, [B, time_channels]."""
        features = timestep_embedding(timestep, self.config.block_out_channels[0])
        time: Tensor = self.time_embedding(features.to(sample.dtype), timestep_cond)
        if self.add_embedding is not None and pooled is not None and time_ids is not None:
            item = timestep_embedding(time_ids.flatten(), self.config.addition_time_embed_dim or 0)
            reported = item.unflatten(0, (-1, TIME_IDS)).flatten(1).to(sample.dtype)
            time = time + self.add_embedding(torch.cat([pooled, reported], dim=-1))
        return time

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
