"""LoRA files of random weights, made in code."""

import re

import torch
from safetensors.torch import load_file, save_file

# Linear layers and convolutions of 1x1 in attention blocks, which most files change.
ATTENTION = r"unet\..*attentions\.\d+\.(proj|transformer)|text_encoder(_2)?\..*layers"


def lora_file(path, checkpoint, layout, *, seed=0, strength=0.6, rank=4, metadata=None, only=""):
    """Changes of every attention, feed-forward and convolution of the UNet and of the text
    encoder's layers, in one of the layouts.

    only: a pattern of the modules that are changed, such as `ATTENTION`
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    if (checkpoint / "text_encoder_2").exists():
        parts["text_encoder_2"] = "model"
    saved = {}
    for part, stem in parts.items():
        for name, weight in load_file(checkpoint / part / f"{stem}.safetensors").items():
            module = name.removesuffix(".weight")
            if weight.ndim not in (2, 4) or "embedding" in name or not name.endswith(".weight"):
                continue
            if not re.search(only, f"{part}.{module}"):
                continue
            inside = weight[0].numel()
            down = torch.randn((rank, *weight.shape[1:]), generator=generator) / inside**0.5
            up = torch.randn((len(weight), rank, *[1] * (weight.ndim - 2)), generator=generator)
            up *= strength * weight.std() * (inside / rank) ** 0.5
            if layout == "kohya":
                prefix = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_"}.get(part, "lora_te_")
                if part != "unet" and not module.startswith("text_model"):
                    prefix += "text_model_"
                stem = prefix + module.replace(".", "_")
                saved |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                saved[f"{stem}.alpha"] = torch.tensor(rank / 2)
            else:
                if part != "unet" and not module.startswith("text_model"):
                    module = "text_model." + module
                saved |= {f"{part}.{module}.lora_A.weight": down}
                saved |= {f"{part}.{module}.lora_B.weight": up}
    save_file({name: tensor.contiguous() for name, tensor in saved.items()}, path, metadata)
    return path
