"""`ControlNetModel` as published for Stable Diffusion 1.x, 2.x and XL: one evaluation.

Knows its configuration and torch; not what is made of the residuals. Zhang et al. 2023,
arXiv:2302.05543.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.errors import CheckpointError

from .unet import UnetEncoder
from .unet_config import UnetConfig

CHANNEL_ORDERS = ("rgb", "bgr")
CONTROL_IMAGE_CHANNELS = 3


@dataclass(frozen=True, slots=True)
class ControlNetConfig:
    """What of a ControlNet's `config.json` shapes the network.

    Attributes:
        unet: Of the way down and the middle that it copies; what is on the way up is not read.
        conditioning_embedding_out_channels: Of the layers that embed the control image, each after
            the first at half the resolution of the one before.
        controlnet_conditioning_channel_order: Of the control image, `rgb` or `bgr`.
        global_pool_conditions: Whether its residuals are means over the image, as those of shuffle.
    """

    unet: UnetConfig
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "ControlNetConfig":
        """Raises CheckpointError for what this network does not have."""
        rest = {key: value for key, value in raw.items() if key not in cls.__slots__}
        channels = rest.pop("conditioning_channels", CONTROL_IMAGE_CHANNELS)
        if channels != CONTROL_IMAGE_CHANNELS:
            raise CheckpointError(
                f"the ControlNet reads control images of {channels} channels, expected "
                f"{CONTROL_IMAGE_CHANNELS}"
            )
        order = str(raw.get("controlnet_conditioning_channel_order", "rgb"))
        if order not in CHANNEL_ORDERS:
            raise CheckpointError(
                f"controlnet_conditioning_channel_order={order!r}, expected "
                f"{' or '.join(CHANNEL_ORDERS)}"
            )
        embedding = raw.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
        pools = bool(raw.get("global_pool_conditions", False))
        return cls(UnetConfig.from_json(rest), tuple(embedding), order, pools)

    @property
    def downscale(self) -> int:
        """Pixels of the control image along one side of a latent."""
        return int(2 ** (len(self.conditioning_embedding_out_channels) - 1))


class ConditioningEmbedding(nn.Module):
    """Embeds a control image [B, 3, H, W] as latents are by `conv_in`, [B, C, H/8, W/8]."""

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(CONTROL_IMAGE_CHANNELS, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in pairwise(widths):
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.silu(self.conv_in(image))
        for block in self.blocks:
            x = F.silu(block(x))
        embedded: Tensor = self.conv_out(x)
        return embedded


class ControlNet(UnetEncoder):
    """sample [B, in, H, W], timestep [B] float32, context [B, M, K], control_image [B, 3, 8H, 8W]
    float in 0..1 -> a residual for each of the UNet's skips, then for its middle.

    pooled and time_ids as the UNet's; no context where no block attends. The residuals are not
    scaled; where they are pooled they are [B, C, 1, 1].
    """

    def __init__(self, config: ControlNetConfig) -> None:
        unet = config.unet
        super().__init__(unet)
        self.global_pool_conditions = config.global_pool_conditions
        widths = unet.block_out_channels
        self.controlnet_cond_embedding = ConditioningEmbedding(
            config.conditioning_embedding_out_channels, widths[0]
        )
        self.controlnet_down_blocks = nn.ModuleList(
            nn.Conv2d(channels, channels, 1) for channels, *_ in unet.skip_shapes(8, 8)
        )
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        control_image: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        time = self.embed_time(sample, timestep, pooled, time_ids)
        x = self.conv_in(sample) + self.controlnet_cond_embedding(control_image)
        skips = [x]
        for down in self.down_blocks:
            x, result = down(x, time, context)
            skips += result
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        layers = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        residuals = (layer(value) for layer, value in zip(layers, (*skips, x), strict=True))
        if self.global_pool_conditions:
            return tuple(residual.mean((2, 3), keepdim=True) for residual in residuals)
        return tuple(residuals)


def rgb_weights(weights: Mapping[str, Tensor], order: str) -> dict[str, Tensor]:
    """A ControlNet's weights for control images in RGB, whatever order it was trained with."""
    name = "controlnet_cond_embedding.conv_in.weight"
    if order == "rgb" or name not in weights:
        return dict(weights)
    return {**weights, name: torch.flip(weights[name], dims=[1])}
