"""`AutoencoderTiny` (TAESD): a distilled autoencoder that decodes many times faster, a bit worse.

Knows its configuration and torch. Its latents are those of Stable Diffusion, scaled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import read_config


@dataclass(frozen=True, slots=True)
class TinyVaeConfig:
    """What of `vae/config.json` shapes the network."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "TinyVaeConfig":
        """Raises CheckpointError for what this network does not have."""
        fixed = {
            "act_fn": "relu",
            "upsample_fn": "nearest",
            "upsampling_scaling_factor": 2,
            "shift_factor": 0.0,
        }
        ignored = ("latent_magnitude", "latent_shift", "force_upcast", "block_out_channels")
        return read_config(cls, raw, fixed=fixed, ignored=ignored)

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent."""
        return int(2 ** (len(self.num_encoder_blocks) - 1))


class TinyBlock(nn.Module):
    """Three convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(channels, channels),
            nn.ReLU(),
            _convolution(channels, channels),
            nn.ReLU(),
            _convolution(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _convolution(channels_in: int, channels_out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options)


class TinyEncoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] -> latents [B, C, H/8, W/8]."""

    def __init__(self, config: TinyVaeConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = config.encoder_block_out_channels
        for i, (width, count) in enumerate(zip(widths, config.num_encoder_blocks, strict=True)):
            first = _convolution(config.in_channels, width)
            layers.append(_convolution(width, width, stride=2, bias=False) if i else first)
            layers += [TinyBlock(width) for _ in range(count)]
        layers.append(_convolution(widths[-1], config.latent_channels))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x + 1.0) / 2.0)


class TinyDecoder(nn.Module):
    """Latents [B, C, H/8, W/8] -> image [B, 3, H, W], about [-1, 1]."""

    def __init__(self, config: TinyVaeConfig) -> None:
        super().__init__()
        widths, counts = config.decoder_block_out_channels, config.num_decoder_blocks
        layers: list[nn.Module] = [_convolution(config.latent_channels, widths[0]), nn.ReLU()]
        for i, (width, count) in enumerate(zip(widths, counts, strict=True)):
            layers += [TinyBlock(width) for _ in range(count)]
            if i < len(widths) - 1:
                layers += [nn.Upsample(scale_factor=2), _convolution(width, width, bias=False)]
            else:
                layers.append(_convolution(width, config.out_channels))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(torch.tanh(latents / 3.0) * 3.0) * 2.0 - 1.0


class AutoencoderTiny(nn.Module):
    """Both, under the published names."""

    def __init__(self, config: TinyVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)


class TinyVaeDecoder(nn.Module):
    """The bundle's `vae_decoder`."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.scale = 1.0 / vae.config.scaling_factor
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents * self.scale)


class TinyVaeEncoder(nn.Module):
    """The bundle's `vae_encoder`; there is no deviation, so nothing is drawn."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.scale = vae.config.scaling_factor
        self.encoder = vae.encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.encoder(image) * self.scale
        return mean, torch.zeros_like(mean)
