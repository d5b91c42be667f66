"""Trains the embedded IP-Adapter `likeness`: images that look like an image of a shape.

    python tools/train_likeness.py

That trains an image encoder and an adapter for the frozen `shapes` model, minutes on one core, and
packs both. The training is seeded, writes a checkpoint every 100 steps and goes on from it when
started again.

The UNet's own cross-attention teaches: where the text's attention to a caption differs from that to
an empty prompt, the attention to the tokens of an image of the caption learns the difference, so
that an empty prompt and the image give what the caption gives. The UNet runs for the queries alone.
"""

import argparse
import json
import logging
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from shapes_likeness import DESCRIPTION, describe, lone_scene, pixels_for_clip, vary
from shapes_scenes import Scene, caption, draw
from shapes_training import Optimizers, load_state, progress, record, save_state
from torch import Tensor, nn
from torch.nn import functional as F
from train_outline import load_base
from train_shapes import (
    SIDE,
    UNET_CONFIG,
    VAE_CONFIG,
    alphas_cumprod,
    ids_from_captions,
    unit_range,
)

from sdrt.export.ip_adapter import LAYERS, PROJECTION, ImageProjection
from sdrt.export.unet import Unet
from sdrt.export.vae import AutoencoderKL

ROOT = Path(__file__).parent.parent / "sdrt" / "models"
SAVE_EVERY = 100
SCENES = 1000
NOISE_LEVELS = 3  # of each scene
READING_WEIGHT = 0.3  # of the description in the loss
EMBEDDING = 256
ENCODER = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE // 2,
    "patch_size": 8,
    "projection_dim": EMBEDDING,
}
log = logging.getLogger("train_likeness")


class Adapter(nn.Module):
    """Image encoder and IP-Adapter, trained together."""

    def __init__(self, unet: Unet) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        torch.manual_seed(0)
        self.image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER))
        self.description = nn.Linear(EMBEDDING, DESCRIPTION)  # teaches the encoder to see
        self.image_proj = ImageProjection(EMBEDDING, UNET_CONFIG.cross_attention_dim)
        for bias in (self.image_proj.proj.bias, self.image_proj.norm.bias):
            nn.init.zeros_(bias).requires_grad_(False)  # no image adds nothing
        pairs = [
            w for layer in unet.cross_attentions for w in (layer.to_k.weight, layer.to_v.weight)
        ]
        self.to_kv_ip = nn.ParameterList(nn.Parameter(weight.detach().clone()) for weight in pairs)

    def embed(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, S, S, 3] -> [B, EMBEDDING]."""
        return self.image_encoder(pixels_for_clip(images)).image_embeds

    def attend(self, tokens: Tensor, index: int, query: Tensor) -> Tensor:
        """Attention of a layer's query [B, heads, N, D] to tokens [B, 4, C]."""
        key, value = (
            F.linear(tokens, weight).unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
            for weight in self.to_kv_ip[2 * index : 2 * index + 2]
        )
        return F.scaled_dot_product_attention(query, key, value)

    def file(self) -> dict[str, Tensor]:
        """The adapter's weights under the names of the published files."""
        weights = {PROJECTION + n: t for n, t in self.image_proj.state_dict().items()}
        for i, weight in enumerate(self.to_kv_ip):
            layer, part = 2 * (i // 2) + 1, "kv"[i % 2]
            weights[f"{LAYERS}{layer}.to_{part}_ip.weight"] = weight.detach()
        return {name: tensor.contiguous() for name, tensor in weights.items()}


def training_scenes() -> list[Scene]:
    rng = np.random.default_rng(5)
    return [lone_scene(rng) for _ in range(SCENES)]


def stack(scenes: list[Scene], side: int) -> Tensor:
    return torch.from_numpy(np.stack([draw(scene, side) for scene in scenes]))


def load_unet() -> Unet:
    unet = Unet(UNET_CONFIG)
    unet.load_state_dict(load_base("unet"))
    return unet.requires_grad_(False)


@torch.no_grad()
def training_set(work: Path) -> dict[str, Tensor]:
    """Of each scene and noise level, by layer: queries of the UNet that reads the caption, and how
    its attention to the caption differs from that to an empty prompt; stored in the folder.
    """
    path = work / "attention.safetensors"
    if path.exists():
        return load_file(path)
    from tqdm import tqdm
    from transformers import CLIPTextModel

    scenes, unet, alphas = training_scenes(), load_unet(), alphas_cumprod()
    text_encoder = CLIPTextModel.from_pretrained(ROOT / "shapes" / "text_encoder").float()
    ids = ids_from_captions([*map(caption, scenes), ""], ROOT / "shapes" / "tokenizer")
    contexts = torch.cat([text_encoder(part).last_hidden_state for part in ids.split(50)])
    latents = encode(scenes)
    generator = torch.Generator().manual_seed(6)
    parts: dict[str, list[Tensor]] = {}
    for start in tqdm(range(0, NOISE_LEVELS * SCENES, 50), desc="queries", mininterval=5):
        chosen = torch.arange(start, start + 50) % SCENES
        timestep = (1000 * torch.rand(50, generator=generator).sqrt()).long()
        alpha, denoised = alphas[timestep][:, None, None, None], latents[chosen]
        noise = torch.randn(denoised.shape, generator=generator)
        noisy = alpha.sqrt() * denoised + (1 - alpha).sqrt() * noise
        for i, (query, change) in enumerate(
            attention_changes(unet, noisy, timestep.float(), contexts[chosen], contexts[-1:])
        ):
            parts.setdefault(f"query_{i}", []).append(query.half())
            parts.setdefault(f"change_{i}", []).append(change.half())
    data = {name: torch.cat(values) for name, values in parts.items()}
    save_file(data, path)
    return data


def encode(scenes: list[Scene]) -> Tensor:
    """Scaled latents of drawn scenes, [B, 4, SIDE / 8, SIDE / 8]."""
    from tqdm import tqdm

    vae = AutoencoderKL(VAE_CONFIG)
    vae.load_state_dict(load_base("vae"))
    scale = json.loads((ROOT / "shapes" / "vae" / "config.json").read_text())["scaling_factor"]
    latents = []
    for start in tqdm(range(0, len(scenes), 50), desc="latents", mininterval=5):
        batch = unit_range(stack(scenes[start : start + 50], SIDE).permute(0, 3, 1, 2))
        latents.append(scale * vae.moments(batch)[0])
    return torch.cat(latents)


def attention_changes(
    unet: Unet, sample: Tensor, timestep: Tensor, context: Tensor, blank: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Of every layer the queries, and attention to the caption less that to an empty prompt."""
    seen: dict[Any, Tensor] = {}
    layers = unet.cross_attentions
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.update({layer: inputs[0]}))
        for layer in layers
    ]
    unet(sample, timestep, context)
    for hook in hooks:
        hook.remove()
    result = []
    for layer in layers:
        query = by_head(layer.to_q(seen[layer]), layer.heads)
        prompted, nothing = (
            F.scaled_dot_product_attention(
                query, *(by_head(to(text), layer.heads) for to in (layer.to_k, layer.to_v))
            )
            for text in (context, blank.expand_as(context))
        )
        result.append((query, prompted - nothing))
    return result


def by_head(values: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def loss_of(
    adapter: Adapter, data: dict[str, Tensor], scenes: list[Scene], choice: Tensor, index: int
) -> Tensor:
    """Of the layers' attention, each relative to what it has to learn, and of the description."""
    rng = np.random.default_rng((7, index))
    varied = [vary(scenes[i % SCENES], rng) for i in choice.tolist()]
    images = stack(varied, SIDE // 2)
    described = [describe(s, image) for s, image in zip(varied, images.numpy(), strict=True)]
    noisy = images + torch.randn(images.shape) * 255 * 0.02
    embedding = adapter.embed(noisy.clamp(0, 255))
    seen = adapter.description(embedding)
    loss = READING_WEIGHT * (seen - torch.from_numpy(np.stack(described))).square().mean()
    tokens = adapter.image_proj(embedding)
    layers = len(adapter.to_kv_ip) // 2
    for i in range(layers):
        query, change = (data[f"{kind}_{i}"][choice].float() for kind in ("query", "change"))
        error = (adapter.attend(tokens, i, query) - change).square().mean()
        loss = loss + error / change.square().mean() / layers
    return loss


def train(work: Path, steps: int, batch_size: int) -> None:
    adapter = Adapter(load_unet())
    log.info("%.2f M parameters", sum(p.numel() for p in adapter.parameters()) / 1e6)
    optimizers = Optimizers(adapter, steps, matrix_lr=None, other_lr=2e-3)
    start = load_state(work / "likeness.pt", adapter, optimizers)
    data, scenes = training_set(work), training_scenes()
    began, recent = time.monotonic(), deque[float](maxlen=100)
    for index in progress(start, steps):
        torch.manual_seed(index)
        choice = torch.randint(NOISE_LEVELS * SCENES, (batch_size,))
        loss = loss_of(adapter, data, scenes, choice, index)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizers.step(index)
        recent.append(float(loss.detach()))
        if (index + 1) % SAVE_EVERY == 0 or index + 1 == steps:
            save_state(work / "likeness.pt", adapter, optimizers, index + 1)
            values = {"loss": sum(recent) / len(recent), "seconds": time.monotonic() - began}
            record(work / "likeness.log", step=index + 1, **values)
    save_file(dict(adapter.state_dict()), work / "likeness.safetensors")


def pack(work: Path, folder: Path) -> None:
    """Write sdrt/models/likeness in fp16: the adapter's file, and its encoder's folder."""
    adapter = Adapter(Unet(UNET_CONFIG))
    adapter.load_state_dict(load_file(work / "likeness.safetensors"))
    adapter.half()
    adapter.image_encoder.save_pretrained(folder / "image_encoder")
    save_file(adapter.file(), folder / "ip_adapter.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/likeness"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.work, args.steps, args.batch_size)
    pack(args.work, ROOT / "likeness")


if __name__ == "__main__":
    main()
