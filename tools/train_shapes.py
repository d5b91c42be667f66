"""Trains the embedded model `shapes`: an AutoencoderKL, then text encoder and UNet on its latents.

    python tools/train_shapes.py

That trains both, about two hours on two cores, and packs the result. One stage at a time:

    python tools/train_shapes.py vae  --steps 3000
    python tools/train_shapes.py unet --steps 7000 --batch-size 64
    python tools/train_shapes.py pack

Each stage is seeded, writes a checkpoint every 250 steps and goes on from it when started again.
`pack` writes the checkpoint that the package ships, in fp16 and in the hub's layout.
"""

import argparse
import json
import logging
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from shapes_scenes import Scene, caption, draw, scene_from_random
from shapes_tokenizer import LENGTH, write_tokenizer
from shapes_training import Optimizers, load_state, progress, record, save_state
from torch import Tensor, nn
from torch.nn import functional as F

from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig
from sdrt.export.vae import AutoencoderKL, VaeConfig

SIDE = 64
SAVE_EVERY = 250
VAE_CONFIG = VaeConfig(block_out_channels=(16, 32, 64, 96), layers_per_block=1, norm_num_groups=8)
TEXT_WIDTH = 128
PLAIN_STEPS = 1792  # of the UNet's, before those with guidance
GUIDANCE = 5.0
UNET_CONFIG = UnetConfig(
    sample_size=SIDE // 8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(80, 120),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=TEXT_WIDTH,
    attention_head_dim=5,
)
log = logging.getLogger("train_shapes")


def quiet_residuals(model: nn.Module) -> None:
    """Start every residual branch of the VAE at zero, so that depth does no harm at first."""
    for name, parameter in model.named_parameters():
        if ".conv2." in name or ".to_out.0." in name:
            nn.init.zeros_(parameter)


def images(count: int, seed: int) -> Tensor:
    """Images of random scenes, uint8 [count, 3, SIDE, SIDE]."""
    rng = np.random.default_rng(seed)
    stack = np.stack([draw(scene_from_random(rng), SIDE) for _ in range(count)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def unit_range(batch: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return batch.float() / 127.5 - 1.0


def vae_loss(vae: AutoencoderKL, batch: Tensor) -> Tensor:
    mean, log_variance = vae.moments(batch)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    out = vae.decode(latents).float()
    error = out - batch
    divergence = 0.5 * (mean.float() ** 2 + log_variance.exp() - 1.0 - log_variance).mean()
    coarse = F.avg_pool2d(error, 4).square().mean()
    return error.abs().mean() + error.square().mean() + coarse + 5e-5 * divergence


@torch.no_grad()
def vae_quality(vae: AutoencoderKL, held: Tensor) -> float:
    """PSNR in dB over held-out images, for the mean latents, rounded to bytes."""
    out = vae.decode(vae.moments(unit_range(held))[0]).clamp(-1, 1)
    error = (((out + 1) * 127.5).round() - held.float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255.0**2 / error.clamp_min(1e-3))).mean())


def train_vae(work: Path, steps: int, batch_size: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAE_CONFIG)
    quiet_residuals(vae)
    optimizers = Optimizers(vae, steps, matrix_lr=2e-3, other_lr=2e-3)
    start = load_state(work / "vae.pt", vae, optimizers)
    pool, held = images(24000, seed=1), images(256, seed=2)
    began = time.monotonic()
    for index in progress(start, steps):
        generator = torch.Generator().manual_seed(index)
        choice = torch.randint(len(pool), (batch_size,), generator=generator)
        batch = unit_range(pool[choice]).contiguous(memory_format=torch.channels_last)
        torch.manual_seed(index)
        with torch.autocast("cpu", torch.bfloat16):
            loss = vae_loss(vae, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizers.step(index)
        if (index + 1) % SAVE_EVERY == 0 or index + 1 == steps:
            save_state(work / "vae.pt", vae, optimizers, index + 1)
            record(
                work / "vae.log",
                step=index + 1,
                loss=float(loss),
                psnr=vae_quality(vae, held),
                seconds=time.monotonic() - began,
            )
    save_file(vae.state_dict(), work / "vae.safetensors")


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                projection_dim=TEXT_WIDTH,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
                pad_token_id=vocabulary - 1,
            )
        )
        self.unet = Unet(UNET_CONFIG)
        for name, parameter in self.unet.named_parameters():
            if any(part in name for part in (".conv2.", ".proj_out.", "conv_out.")):
                nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        return self.unet(latents, timestep, self.text_encoder(ids).last_hidden_state)


def scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scene_from_random(rng) for _ in range(count)]


def ids_from_captions(captions: list[str], folder: Path) -> Tensor:
    """Token ids [B, LENGTH] by the reference tokenizer."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>"
    )
    batch = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True)
    return torch.tensor(batch["input_ids"])


@torch.no_grad()
def training_set(work: Path, count: int) -> dict[str, Tensor]:
    """Moments of every image's latents and the ids of its caption; kept next to the weights."""
    path = work / "latents.safetensors"
    if path.exists():
        return load_file(path)
    vae = AutoencoderKL(VAE_CONFIG)
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    result = scenes(count, seed=3)
    means = []
    from tqdm import tqdm

    for start in tqdm(range(0, count, 100), desc="latents"):
        stack = np.stack([draw(scene, SIDE) for scene in result[start : start + 100]])
        batch = unit_range(torch.from_numpy(stack).permute(0, 3, 1, 2))
        with torch.autocast("cpu", torch.bfloat16):
            means.append(
                vae.moments(batch.contiguous(memory_format=torch.channels_last))[0].float()
            )
    ids = ids_from_captions([*map(caption, result), ""], work / "tokenizer")
    data = {"latents": torch.cat(means).contiguous(), "ids": ids}
    save_file(data, path)
    return data


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's schedule: betas linear in their square root, 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def plain_loss(
    denoiser: Denoiser, noisy: Tensor, timestep: Tensor, text: Tensor, noise: Tensor
) -> Tensor:
    """Ho et al. 2020 (arXiv:2006.11239), eq. 14."""
    with torch.autocast("cpu", torch.bfloat16):
        out = denoiser(noisy, timestep, text)
    return (out.float() - noise).square().mean()


def guided_loss(
    denoiser: Denoiser, noisy: Tensor, timestep: Tensor, text: Tensor, blank: Tensor, noise: Tensor
) -> Tensor:
    """The same for the blank caption, and for the guided combination of both outputs.

    A caption here determines its image almost wholly, so plain training gives a model that is
    right at guidance 1 and torn apart at the guidance that people use. Asking the combination at
    `GUIDANCE` to be right puts the text's pull where it is in large models.
    """
    with torch.autocast("cpu", torch.bfloat16):
        nothing = denoiser.text_encoder(blank[None]).last_hidden_state
        context = denoiser.text_encoder(text).last_hidden_state
        both = torch.cat([nothing.expand_as(context), context])
        out = denoiser.unet(noisy.repeat(2, 1, 1, 1), timestep.repeat(2), both)
    unguided, guided = out.float().chunk(2)
    combined = unguided.detach() + GUIDANCE * (guided - unguided.detach())
    return (unguided - noise).square().mean() + (combined - noise).square().mean()


def train_unet(work: Path, steps: int, batch_size: int) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(write_tokenizer(work / "tokenizer"))
    log.info("%.2f M parameters", sum(p.numel() for p in denoiser.parameters()) / 1e6)
    optimizers = Optimizers(denoiser, steps, matrix_lr=2e-3, other_lr=1e-3)
    start = load_state(work / "unet.pt", denoiser, optimizers)
    data = training_set(work, 30000)
    latents, ids, blank = data["latents"], data["ids"][:-1], data["ids"][-1]
    scale = 1.0 / latents.std()
    alphas = alphas_cumprod()
    began, recent = time.monotonic(), deque[float](maxlen=100)
    for index in progress(start, steps):
        generator = torch.Generator().manual_seed(index)
        choice = torch.randint(len(latents), (batch_size,), generator=generator)
        timestep = torch.randint(1000, (batch_size,), generator=generator)
        denoised = latents[choice] * scale
        noise = torch.randn(denoised.shape, generator=generator)
        text = ids[choice].clone()
        alpha = alphas[timestep][:, None, None, None]
        noisy = alpha.sqrt() * denoised + (1 - alpha).sqrt() * noise
        if index < PLAIN_STEPS:
            text[torch.rand(batch_size, generator=generator) < 0.1] = blank
            loss = plain_loss(denoiser, noisy, timestep.float(), text, noise)
        else:
            loss = guided_loss(denoiser, noisy, timestep.float(), text, blank, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizers.step(index)
        recent.append(float(loss.detach()))
        if (index + 1) % SAVE_EVERY == 0 or index + 1 == steps:
            save_state(work / "unet.pt", denoiser, optimizers, index + 1)
            mean = sum(recent) / len(recent)
            record(work / "unet.log", step=index + 1, loss=mean, seconds=time.monotonic() - began)
    save_file(denoiser.unet.state_dict(), work / "unet.safetensors")
    save_file(denoiser.text_encoder.state_dict(), work / "text_encoder.safetensors")


def pack(work: Path, folder: Path) -> None:
    """Write sdrt/models/shapes: configurations, fp16 weights, tokenizer, scheduler, index."""
    from transformers import CLIPTextConfig

    weights = {
        part: load_file(work / f"{part}.safetensors") for part in ("text_encoder", "unet", "vae")
    }
    scale = 1.0 / float(load_file(work / "latents.safetensors")["latents"].std())
    text = Denoiser(write_tokenizer(folder / "tokenizer")).text_encoder
    assert isinstance(text.config, CLIPTextConfig)
    text.load_state_dict(weights["text_encoder"])
    text.half().save_pretrained(folder / "text_encoder")
    for part, config in (("unet", unet_json()), ("vae", vae_json(scale))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        write_json(folder / part / "config.json", config)
        half = {name: tensor.half().contiguous() for name, tensor in weights[part].items()}
        save_file(half, folder / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", MODEL_INDEX)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.35.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def unet_json() -> dict:
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.35.0",
        **asdict(UNET_CONFIG),
    }


def vae_json(scale: float) -> dict:
    count = len(VAE_CONFIG.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.35.0",
        **asdict(VAE_CONFIG),
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "sample_size": SIDE,
        "scaling_factor": round(scale, 5),
    }


# What trains each stage, its steps and its batch size.
STAGES = {"vae": (train_vae, 3000, 32), "unet": (train_unet, 7000, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", nargs="?", choices=("all", *STAGES, "pack"), default="all")
    parser.add_argument("--work", type=Path, default=Path("build/shapes"))
    parser.add_argument("--steps", type=int, help="of the stage, instead of its own number")
    parser.add_argument("--batch-size", type=int)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage, (train, steps, batch_size) in STAGES.items():
        if args.stage in ("all", stage):
            train(args.work, args.steps or steps, args.batch_size or batch_size)
    if args.stage in ("all", "pack"):
        pack(args.work, Path(__file__).parent.parent / "sdrt" / "models" / "shapes")


if __name__ == "__main__":
    main()
