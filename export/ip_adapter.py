"""IP-Adapter: an image as a prompt (Ye et al. 2023, arXiv:2308.06721).

Knows the published files' names of weights and their networks; not the UNet that attends to the
result, nor where files come from.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.errors import CheckpointError

HEAD = 64  # channels of each head of the resampler
BASE_TOKENS = 4
PROJECTION, LAYERS = "image_proj.", "ip_adapter."


class ImageProjection(nn.Module):
    """The base adapter's: an image's embedding [B, E] -> tokens [B, 4, C]."""

    def __init__(self, embedding: int, context: int) -> None:
        super().__init__()
        self.proj = nn.Linear(embedding, BASE_TOKENS * context)
        self.norm = nn.LayerNorm(context)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).unflatten(-1, (BASE_TOKENS, -1)))


class FullImageProjection(nn.Module):
    """The full-face adapter's: an image's hidden states [B, N, E] -> tokens [B, N, C]."""

    def __init__(self, embedding: int, context: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(embedding, embedding),
            nn.GELU(),
            nn.Linear(embedding, context),
            nn.LayerNorm(context),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class PerceiverAttention(nn.Module):
    """Attention of learned latents [B, Q, D] over an image's states and themselves."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(channels, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, channels, bias=False)

    def forward(self, states: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        source = torch.cat([self.norm1(states), latents], dim=1)
        q, k, v = (
            t.unflatten(-1, (-1, HEAD)).transpose(1, 2)  # [B, heads, N, 64]
            for t in (self.to_q(latents), *self.to_kv(source).chunk(2, dim=-1))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """The Plus adapters': an image's hidden states [B, N, E] -> tokens [B, Q, C]; a perceiver
    (Jaegle et al. 2021, arXiv:2103.03206).
    """

    def __init__(
        self, embedding: int, context: int, *, channels: int, inner: int, queries: int, depth: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, queries, channels))
        self.proj_in = nn.Linear(embedding, channels)
        self.proj_out = nn.Linear(channels, context)
        self.norm_out = nn.LayerNorm(context)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(channels, inner),
                    nn.Sequential(
                        nn.LayerNorm(channels),
                        nn.Linear(channels, channels * 4, bias=False),
                        nn.GELU(),
                        nn.Linear(channels * 4, channels, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, image: Tensor) -> Tensor:
        states = self.proj_in(image)
        latents = self.latents.expand(image.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = latents + attention(states, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


@dataclass(frozen=True, slots=True)
class IpAdapterConfig:
    """The shape of an IP-Adapter, read off its weights.

    Attributes:
        projection: Its kind: base, plus or full_face.
        embedding: Width of what it reads of an image.
        context: Width of the tokens, which is that of the UNet's text context.
        layers: Channels of each of the UNet's cross-attention layers.
        tokens: For each image; None is one for each hidden state.
    """

    projection: str
    embedding: int
    context: int
    layers: tuple[int, ...]
    tokens: int | None

    @property
    def reads_hidden_states(self) -> bool:
        """Whether it reads the image encoder's penultimate hidden states, not its embedding."""
        return self.projection != "base"


class IpAdapter(nn.Module):
    """An image's embedding, or hidden states -> [B, T, 2 * sum of layers]: keys, then values, of
    its tokens for one cross-attention layer of the UNet after the other.
    """

    def __init__(self, config: IpAdapterConfig, projection: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.image_proj = projection
        self.to_kv_ip = nn.Linear(config.context, 2 * sum(config.layers), bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.to_kv_ip(self.image_proj(image))


class ImageEncoder(nn.Module):
    """transformers' CLIP vision model: pixels [B, 3, S, S], as CLIP reads them -> its embedding
    [B, E], or its penultimate hidden states [B, N, W].
    """

    def __init__(self, model: nn.Module, *, hidden_states: bool) -> None:
        super().__init__()
        self.model, self.hidden_states = model, hidden_states

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.model(pixels, output_hidden_states=self.hidden_states)
        result: Tensor = output.hidden_states[-2] if self.hidden_states else output.image_embeds
        return result


def build_ip_adapter(weights: Mapping[str, Tensor]) -> IpAdapter:
    """An adapter with the weights of a published file.

    Args:
        weights: By name, `image_proj.*` and `ip_adapter.*`.

    Raises:
        CheckpointError: For a kind of adapter that is not supported, or weights that do not fit.
    """
    projection = {
        n.removeprefix(PROJECTION): t for n, t in weights.items() if n.startswith(PROJECTION)
    }
    layers = {n.removeprefix(LAYERS): t for n, t in weights.items() if n.startswith(LAYERS)}
    if not projection or not layers:
        raise CheckpointError(
            "no IP-Adapter: expected weights named image_proj.* and ip_adapter.*, found "
            f"{min(weights, default='none')}"
        )
    _refuse_face_id(weights)
    pairs = _key_value_pairs(layers)
    config = _read_config(projection, tuple(len(key) for key, _ in pairs))
    _check_width(pairs, config.context)
    module = _build_projection(config, projection)
    _load(module, projection)
    adapter = IpAdapter(config, module)
    adapter.to_kv_ip.weight = nn.Parameter(torch.cat([t.float() for pair in pairs for t in pair]))
    return adapter.eval().requires_grad_(False)


def _select(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def _refuse_face_id(weights: Mapping[str, Tensor]) -> None:
    face_id = any("lora" in name or "perceiver_resampler" in name for name in weights)
    if face_id or ("image_proj.norm.weight" in weights and "image_proj.proj.2.weight" in weights):
        raise CheckpointError(
            "IP-Adapter FaceID is unsupported: it reads the embedding of a face recognition model",
            hint="use a Plus or Plus-face adapter, which reads the image",
        )


def _key_value_pairs(layers: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The projections to keys and values of every cross-attention layer, in the file's order."""
    numbers = sorted({int(n.split(".")[0]) for n in layers if re.match(r"\d+\.to_[kv]_ip\.", n)})
    names = [(f"{i}.to_k_ip.weight", f"{i}.to_v_ip.weight") for i in numbers]
    expected = {name for pair in names for name in pair}
    if not numbers or (odd := sorted(set(layers) ^ expected)):
        raise CheckpointError(
            f"IP-Adapter: unexpected or missing weight {LAYERS}{odd[0] if numbers else ''}; "
            "expected a to_k_ip and a to_v_ip for each cross-attention layer"
        )
    return [(layers[key], layers[value]) for key, value in names]


def _read_config(projection: Mapping[str, Tensor], layers: tuple[int, ...]) -> IpAdapterConfig:
    if "proj.weight" in projection:
        wide, embedding = projection["proj.weight"].shape
        return IpAdapterConfig("base", embedding, wide // BASE_TOKENS, layers, BASE_TOKENS)
    if "proj.3.weight" in projection:
        context, embedding = projection["proj.2.weight"].shape
        return IpAdapterConfig("full_face", embedding, context, layers, None)
    if "latents" in projection and "proj_in.weight" in projection:
        embedding = projection["proj_in.weight"].shape[1]
        context, queries = projection["proj_out.weight"].shape[0], projection["latents"].shape[1]
        return IpAdapterConfig("plus", embedding, context, layers, queries)
    raise CheckpointError(
        f"IP-Adapter: unknown image projection with weight {PROJECTION}{min(projection)}; "
        "supported are the base, Plus, Plus-face and full-face adapters"
    )


def _build_projection(config: IpAdapterConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    if config.projection == "base":
        return ImageProjection(config.embedding, config.context)
    if config.projection == "full_face":
        return FullImageProjection(config.embedding, config.context)
    depth = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    return Resampler(
        config.embedding,
        config.context,
        channels=weights["latents"].shape[2],
        inner=weights["layers.0.0.to_q.weight"].shape[0],
        queries=weights["latents"].shape[1],
        depth=depth,
    )


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(set(expected) | set(weights)):
        actual = tuple(weights[name].shape) if name in weights else None
        if actual != expected.get(name):
            raise CheckpointError(
                f"IP-Adapter: {PROJECTION}{name} is {actual or 'missing'}, expected "
                f"{expected.get(name) or 'no such weight'}"
            )
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})


def _check_width(pairs: list[tuple[Tensor, Tensor]], context: int) -> None:
    for key, value in pairs:
        if key.shape != value.shape or key.shape[1] != context:
            raise CheckpointError(
                f"IP-Adapter: keys are projected by {tuple(key.shape)} and values by "
                f"{tuple(value.shape)}; expected both from a width of {context}"
            )


def read_image_encoder_config(raw: Mapping[str, Any], config: IpAdapterConfig) -> Any:
    """transformers' configuration of an adapter's image encoder.

    Raises:
        CheckpointError: The encoder is not a CLIP vision model of the adapter's width.
    """
    import transformers

    if raw.get("model_type") not in (None, "clip_vision_model"):
        raise CheckpointError(
            f"image encoder: model_type is {raw.get('model_type')!r}, expected clip_vision_model"
        )
    result: Any = transformers.CLIPVisionConfig(**raw)
    result._attn_implementation = "sdpa"
    width = result.hidden_size if config.reads_hidden_states else result.projection_dim
    if width != config.embedding:
        raise CheckpointError(
            f"image encoder has width {width}, and the adapter reads {config.embedding}",
            hint="pass the encoder that the adapter was trained with: most read ViT-H/14 "
            "(models/image_encoder), the XL base adapter ViT-bigG (sdxl_models/image_encoder)",
        )
    return result
