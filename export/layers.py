"""The pieces that Stable Diffusion's networks are made of, with the published state-dict names.

Knows torch and nothing else: no checkpoint, no ONNX, no sampler. Feature maps are [B, C, H, W],
token sequences [B, N, C]. Attention is `scaled_dot_product_attention`, so that the exporter writes
one `Attention` node and torch picks its fused kernel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut, conditioned on the time embedding when there is one.

    x [B, in, H, W], time [B, time_channels] or None -> [B, out, H, W]
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, groups: int, eps: float, time: int = 0
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, channels_out) if time else None
        self.norm2 = nn.GroupNorm(groups, channels_out, eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.conv_shortcut = None if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            hidden = hidden + self.time_emb_proj(F.silu(time))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] over context [B, M, K], or over itself."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        context: int | None = None,
        qkv_bias: bool = False,
        upcast: bool = False,
    ) -> None:
        """upcast: attend in float32, where a model's half-precision scores overflow."""
        super().__init__()
        self.heads, self.upcast = heads, upcast
        # Keys and values [B, heads, T, C / heads] of an image prompt, and its scale [B, 1, 1, 1].
        self.image_prompt: tuple[Tensor, Tensor, Tensor] | None = None
        source = channels if context is None else context
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(source, channels, bias=qkv_bias)
        self.to_v = nn.Linear(source, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, C / heads]
            for t in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        out = self._attend(q, k, v)
        if self.image_prompt is not None:
            keys, values, scale = self.image_prompt
            out = out + scale * self._attend(q, keys, values)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.upcast and q.dtype != torch.float32:
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v)


class SpatialAttention(Attention):
    """Self-attention over all positions of a feature map; the VAE's has a single head."""

    def __init__(self, channels: int, *, groups: int, eps: float, heads: int = 1) -> None:
        super().__init__(channels, heads=heads, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        height = x.shape[2]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        out = super().forward(tokens).transpose(1, 2)
        return x + out.unflatten(2, (height, -1))


class GatedLinear(nn.Module):
    """GEGLU: one projection, half of it gated by the other half's GELU (arXiv:2002.05202)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; `net.1` is the published layout's dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels * 4
        self.net = nn.Sequential(
            GatedLinear(channels, inner), nn.Identity(), nn.Linear(inner, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each with a residual."""

    def __init__(self, channels: int, heads: int, context: int, *, upcast: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context=context, upcast=upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over a feature map's positions: x [B, C, H, W], context [B, M, K].

    linear: whether the projections around them are linear layers (2.x) or 1x1 convolutions (1.x)
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        context: int,
        groups: int,
        depth: int = 1,
        linear: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = _projection(channels, linear)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context, upcast=upcast) for _ in range(depth)
        )
        self.proj_out = _projection(channels, linear)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, hidden = x.shape[2], self.norm(x)
        if self.linear:
            tokens = self.proj_in(hidden.flatten(2).transpose(1, 2))  # [B, H*W, C]
        else:
            tokens = self.proj_in(hidden).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.linear:
            return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, (height, -1))
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, (height, -1)))


def _projection(channels: int, linear: bool) -> nn.Module:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


class Downsample(nn.Module):
    """Half the height and width. The VAE pads right and below only, the UNet on all sides."""

    def __init__(self, channels: int, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def timestep_embedding(
    timestep: Tensor, channels: int, *, cosines_first: bool = True, shift: int = 0
) -> Tensor:
    """Sinusoids of the timestep: [B] -> [B, channels], float32.

    shift: frequencies fall from 1 to 1/10000 at `shift` before the end of each half
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / (half - shift)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * exponent)
    angles = timestep.float()[:, None] * frequencies[None]
    both = (angles.cos(), angles.sin())
    return torch.cat(both if cosines_first else both[::-1], dim=-1)
