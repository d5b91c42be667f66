"""`AutoencoderKL`: images to latents and back, as published for Stable Diffusion 1.x.

Knows its configuration and torch. `VaeDecoder` and `VaeEncoder` are the two components of a bundle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import read_config
from .layers import Downsample, ResnetBlock, SpatialAttention, Upsample

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """What of `vae/config.json` shapes the network."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "VaeConfig":
        widths = raw.get("block_out_channels")
        sides = ("down_block_types", "up_block_types")
        stages = {side: len(widths if widths else raw.get(side, ())) for side in sides}
        fixed = {
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * stages["down_block_types"],
            "up_block_types": ["UpDecoderBlock2D"] * stages["up_block_types"],
            "mid_block_add_attention": True,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "shift_factor": None,
            "latents_mean": None,
            "latents_std": None,
        }
        return read_config(cls, raw, fixed=fixed, ignored=("force_upcast",))

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent."""
        return int(2 ** (len(self.block_out_channels) - 1))


class Stage(nn.Module):
    """The residual blocks of one resolution, then a change of resolution unless it is the last."""

    def __init__(
        self, channels_in: int, channels_out: int, layers: int, groups: int, resample: str | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(
                channels_in if i == 0 else channels_out, channels_out, groups=groups, eps=EPS
            )
            for i in range(layers)
        )
        self.downsamplers = self.upsamplers = None
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(channels_out, symmetric=False)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(channels_out)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for change in self.downsamplers or self.upsamplers or ():
            x = change(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2)
        )
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups, eps=EPS)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> moments [B, 2 * latent_channels, H/8, W/8]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block,
                groups,
                "down" if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [B, latent_channels, H/8, W/8] -> image [B, 3, H, W]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                groups,
                "up" if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the 1x1 convolutions between them and the latents."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> mean and log variance of the latents, unscaled."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, C, H/8, W/8] -> image [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))


class VaeDecoder(nn.Module):
    """The bundle's `vae_decoder`: scaled latents, as the sampler leaves them, to an image."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scale = 1.0 / vae.config.scaling_factor
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents * self.scale))


class VaeEncoder(nn.Module):
    """The bundle's `vae_encoder`: an image to mean and deviation of its scaled latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scale = vae.config.scaling_factor
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return mean * self.scale, std * self.scale


def preview_projection(encoder: nn.Module, downscale: int) -> tuple[tuple[float, ...], ...]:
    """Colours from latents by least squares over soft patches of colour, [3, C + 1]."""
    side = 16
    generator = torch.Generator().manual_seed(0)
    patches = torch.rand((1, 3, side // 2, side // 2), generator=generator) * 2.0 - 1.0
    pixels = nn.functional.interpolate(patches, scale_factor=2 * downscale, mode="bilinear")
    mean, _ = encoder(pixels)
    colours = nn.functional.avg_pool2d(pixels, downscale)
    known = torch.cat([mean, torch.ones_like(mean[:, :1])], dim=1).flatten(2)[0].double()
    fitted = torch.linalg.lstsq(known.T, colours.flatten(2)[0].double().T).solution.T
    return tuple(tuple(round(float(value), 5) for value in row) for row in fitted)
