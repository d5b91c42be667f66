"""Trains the embedded ControlNet `outline`: shapes inside the outlines of a control image.

    python tools/train_outline.py

That trains it next to the frozen `shapes` model, about half an hour on one core, and packs it. The
training is seeded, writes a checkpoint every 250 steps and goes on from it when started again. The
ControlNet begins as a copy of the UNet's way down, with residuals of zero.
"""

import argparse
import json
import logging
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from shapes_outlines import LINES, draw_outline, scene_for_training
from shapes_scenes import caption, draw
from shapes_training import Optimizers, load_state, progress, record, save_state
from torch import Tensor, nn
from train_shapes import (
    GUIDANCE,
    SIDE,
    UNET_CONFIG,
    VAE_CONFIG,
    alphas_cumprod,
    ids_from_captions,
    unit_range,
    write_json,
)

from sdrt.export.controlnet import ControlNet, ControlNetConfig
from sdrt.export.unet import Unet
from sdrt.export.vae import AutoencoderKL

ROOT = Path(__file__).parent.parent / "sdrt" / "models"
SAVE_EVERY = 250
SCENES = 12000
CONFIG = {
    "in_channels": 4,
    "down_block_types": UNET_CONFIG.down_block_types,
    "mid_block_type": "UNetMidBlock2D",
    "block_out_channels": UNET_CONFIG.block_out_channels,
    "layers_per_block": UNET_CONFIG.layers_per_block,
    "norm_num_groups": UNET_CONFIG.norm_num_groups,
    "cross_attention_dim": UNET_CONFIG.cross_attention_dim,
    "attention_head_dim": UNET_CONFIG.attention_head_dim,
    "conditioning_embedding_out_channels": (16, 32, 64, 96),
}
log = logging.getLogger("train_outline")


def load_base(part: str) -> dict[str, Tensor]:
    """The embedded model's weights of a part, in float32."""
    weights = load_file(ROOT / "shapes" / part / "diffusion_pytorch_model.safetensors")
    return {name: tensor.float() for name, tensor in weights.items()}


def new_controlnet(unet: Unet) -> ControlNet:
    """A ControlNet that copies a UNet's way down and whose residuals are zeros."""
    torch.manual_seed(0)
    net = ControlNet(ControlNetConfig.from_json(CONFIG))
    own = net.state_dict()
    net.load_state_dict({**own, **{k: v for k, v in unet.state_dict().items() if k in own}})
    zeros = (net.controlnet_down_blocks, net.controlnet_mid_block)
    for parameter in (p for module in zeros for p in module.parameters()):
        nn.init.zeros_(parameter)
    return net


@torch.no_grad()
def training_set(work: Path, count: int) -> dict[str, Tensor]:
    """Scaled latents, outlines and text contexts of random scenes; stored next to the weights."""
    path = work / "scenes.safetensors"
    if path.exists():
        return load_file(path)
    from tqdm import tqdm
    from transformers import CLIPTextModel

    vae = AutoencoderKL(VAE_CONFIG)
    vae.load_state_dict(load_base("vae"))
    scale = json.loads((ROOT / "shapes" / "vae" / "config.json").read_text())["scaling_factor"]
    text_encoder = CLIPTextModel.from_pretrained(ROOT / "shapes" / "text_encoder").float()
    rng = np.random.default_rng(4)
    scenes = [scene_for_training(rng) for _ in range(count)]
    ids = ids_from_captions([*map(caption, scenes), ""], ROOT / "shapes" / "tokenizer")
    latents, contexts = [], []
    for start in tqdm(range(0, count, 100), desc="latents"):
        stack = np.stack([draw(scene, SIDE) for scene in scenes[start : start + 100]])
        batch = unit_range(torch.from_numpy(stack).permute(0, 3, 1, 2))
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(scale * vae.moments(batch)[0].float())
    for chunk in ids.split(100):
        with torch.autocast("cpu", torch.bfloat16):
            contexts.append(text_encoder(chunk).last_hidden_state.half())
    lines = [draw_outline(scene, SIDE, rng.uniform(*LINES))[..., 0] for scene in scenes]
    data = {
        "latents": torch.cat(latents).contiguous(),
        "contexts": torch.cat(contexts),
        "outlines": torch.from_numpy(np.stack(lines)),
    }
    save_file(data, path)
    return data


def guided_loss(
    unet: Unet, net: ControlNet, inputs: dict[str, Tensor], blank: Tensor, noise: Tensor
) -> Tensor:
    """Of the blank caption and of the guided combination, as the base model was trained: both rows
    are under control.
    """
    context = inputs["context"]
    both = {name: torch.cat([value, value]) for name, value in inputs.items()}
    both["context"] = torch.cat([blank.expand_as(context), context])
    image = both.pop("control_image")
    with torch.autocast("cpu", torch.bfloat16):
        *down, mid = net(**both, control_image=image)
        residuals = {f"down_block_residual_{i}": value for i, value in enumerate(down)}
        out = unet(**both, residuals={**residuals, "mid_block_residual": mid})
    unguided, guided = out.float().chunk(2)
    combined = unguided.detach() + GUIDANCE * (guided - unguided.detach())
    return (unguided - noise).square().mean() + (combined - noise).square().mean()


def train(work: Path, steps: int, batch_size: int) -> None:
    unet = Unet(UNET_CONFIG)
    unet.load_state_dict(load_base("unet"))
    unet.requires_grad_(False)
    net = new_controlnet(unet)
    log.info("%.2f M parameters", sum(p.numel() for p in net.parameters()) / 1e6)
    optimizers = Optimizers(net, steps, matrix_lr=1e-3, other_lr=1e-3)
    start = load_state(work / "controlnet.pt", net, optimizers)
    data, alphas = training_set(work, SCENES), alphas_cumprod()
    blank = data["contexts"][-1].float()
    began, recent = time.monotonic(), deque[float](maxlen=100)
    for index in progress(start, steps):
        generator = torch.Generator().manual_seed(index)
        choice = torch.randint(SCENES, (batch_size,), generator=generator)
        timestep = torch.randint(1000, (batch_size,), generator=generator)
        denoised = data["latents"][choice]
        noise = torch.randn(denoised.shape, generator=generator)
        alpha = alphas[timestep][:, None, None, None]
        outline = data["outlines"][choice].float()[:, None] / 255.0
        inputs = {
            "sample": alpha.sqrt() * denoised + (1 - alpha).sqrt() * noise,
            "timestep": timestep.float(),
            "context": data["contexts"][choice].float(),
            "control_image": outline.expand(-1, 3, -1, -1),
        }
        loss = guided_loss(unet, net, inputs, blank, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizers.step(index)
        recent.append(float(loss.detach()))
        if (index + 1) % SAVE_EVERY == 0 or index + 1 == steps:
            save_state(work / "controlnet.pt", net, optimizers, index + 1)
            mean = sum(recent) / len(recent)
            record(
                work / "controlnet.log",
                step=index + 1,
                loss=mean,
                seconds=time.monotonic() - began,
            )
    save_file(net.state_dict(), work / "controlnet.safetensors")


def pack(work: Path, folder: Path) -> None:
    """Write sdrt/models/outline: configuration and fp16 weights, in the hub's layout."""
    weights = load_file(work / "controlnet.safetensors")
    half = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    version = {"_class_name": "ControlNetModel", "_diffusers_version": "0.35.0"}
    write_json(folder / "config.json", {**version, **CONFIG})
    save_file(half, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/outline"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.work, args.steps, args.batch_size)
    pack(args.work, ROOT / "outline")


if __name__ == "__main__":
    main()
