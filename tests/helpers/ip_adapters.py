"""Files of small IP-Adapters with random weights, in the published layout."""

from pathlib import Path

KINDS = ("base", "plus", "full_face")
ENCODER = {
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 18,
}


def ip_adapter_weights(kind: str, unet, seed: int = 0) -> dict:
    """Weights by name of an adapter for a UNet of diffusers'."""
    import torch

    from sdrt.export.ip_adapter import FullImageProjection, ImageProjection, Resampler

    context = unet.config.cross_attention_dim
    torch.manual_seed(seed)
    projection = {
        "base": lambda: ImageProjection(ENCODER["projection_dim"], context),
        "full_face": lambda: FullImageProjection(ENCODER["hidden_size"], context),
        "plus": lambda: Resampler(
            ENCODER["hidden_size"], context, channels=16, inner=128, queries=6, depth=4
        ),
    }[kind]()
    weights = {f"image_proj.{name}": t for name, t in projection.state_dict().items()}
    if kind == "plus":
        weights["image_proj.latents"] = torch.randn(1, 6, 16)
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            wide = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for which in "kv":
                weights[f"ip_adapter.{i}.to_{which}_ip.weight"] = torch.randn(wide, context) * 0.3
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def write_image_encoder(folder: Path) -> Path:
    """A small CLIP vision model in transformers' layout."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.CLIPVisionConfig(**ENCODER)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def load_reference(unet, weights: dict):
    """Load an adapter into diffusers' UNet, which splits the names itself."""
    parts = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.clone()
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    return unet.eval()


def photo(seed: int = 9):
    """Blocks of random colours, higher than wide."""
    import numpy as np
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


def load_pipeline(kind: str, own, adapter: tuple[Path, Path], scale, **parts):
    """One of diffusers' pipelines with an adapter, and with the scheduler of ours."""
    import diffusers

    file, encoder = adapter
    config = own.scheduler_config
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipe = getattr(diffusers, kind)(**parts, scheduler=scheduler)
    pipe.load_ip_adapter(
        str(file.parent),
        subfolder="",
        weight_name=file.name,
        image_encoder_folder=encoder.name,
        low_cpu_mem_usage=False,
        local_files_only=True,
    )
    pipe.set_ip_adapter_scale(scale)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_states(config, count: int = 2):
    import torch

    shape = (
        (count, 5, config.embedding) if config.reads_hidden_states else (count, config.embedding)
    )
    return torch.randn(shape)


def write_ip_adapter(folder: Path, kind: str, unet) -> tuple[Path, Path]:
    """An adapter's file and its image encoder's folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(ip_adapter_weights(kind, unet), folder / f"{kind}.safetensors")
    return folder / f"{kind}.safetensors", write_image_encoder(folder / "image_encoder")
