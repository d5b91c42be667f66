"""The configuration of a `UNet2DConditionModel`: what it shapes, and the shapes of its skips.

Knows published settings and the layers that they build; not how those are connected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdrt.bundle.manifest import (
    ADAPTER_STATE,
    DOWN_RESIDUAL,
    MID_RESIDUAL,
    REFINER_TIME_IDS,
    TIME_IDS,
)
from sdrt.errors import CheckpointError

from .config import read_config
from .layers import ResnetBlock, SpatialTransformer

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
    models that are also conditioned on the pooled prompt and on sizes. `num_time_ids` counts these
    numbers; no file says it, the width of the pooled prompt does. `time_cond_proj_dim` is the width
    of the guidance scale's embedding in models that take one, which are distilled from guided ones.
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
    num_time_ids: int = TIME_IDS

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
        numbers.
        """
        kind, item = self.addition_embed_type, self.addition_time_embed_dim
        width = self.projection_class_embeddings_input_dim
        if kind is None and item is None and width is None:
            return
        if kind != "text_time" or not item or not width or width <= REFINER_TIME_IDS * item:
            raise CheckpointError(
                f"UnetConfig: addition_embed_type={kind!r} with addition_time_embed_dim={item!r} "
                f"and projection_class_embeddings_input_dim={width!r}; expected none of them, or "
                f"text_time with a width beyond {REFINER_TIME_IDS} times the second"
            )

    @property
    def pooled_width(self) -> int:
        """Width of the pooled prompt that the model is conditioned on; 0 if there is none."""
        item, width = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        return width - self.num_time_ids * item if width and item else 0

    @property
    def attends(self) -> bool:
        """Whether the way down or the middle reads the prompt."""
        blocks = (*self.down_block_types, self.mid_block_type or "")
        return any("CrossAttn" in block for block in blocks)

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

    @property
    def cross_attention_counts(self) -> tuple[int, int, int]:
        """Cross-attention layers on the way down, in the middle and on the way up."""
        layers, last = self.layers_per_block, len(self.block_out_channels) - 1
        down, up = (
            [stage for stage, kind in enumerate(kinds) if kind.startswith("CrossAttn")]
            for kinds in (self.down_block_types, self.up_block_types)
        )
        attends = self.mid_block_type == "UNetMidBlock2DCrossAttn"
        return (
            sum(sum(self.depths(stage, layers)) for stage in down),
            sum(self.depths(last, 1)) if attends else 0,
            sum(sum(self.depths(last - index, layers + 1, up=True)) for index in up),
        )

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
