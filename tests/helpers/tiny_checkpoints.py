"""Checkpoints of a few thousand random weights, in the hub's layout."""

import json
import shutil
from pathlib import Path


def write_tiny(folder: Path, embedded: Path, **unet_options) -> Path:
    import torch
    from safetensors.torch import save_file

    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig
    from sdrt.export.vae import AutoencoderKL, VaeConfig

    torch.manual_seed(0)
    shutil.copytree(embedded / "tokenizer", folder / "tokenizer")
    shutil.copytree(embedded / "scheduler", folder / "scheduler")
    write_text_encoder(folder, "text_encoder", "CLIPTextModel", num_hidden_layers=1)
    unet = {
        "sample_size": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        **unet_options,
    }
    vae = {
        "block_out_channels": [4] * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    result = {
        # first, so that models of other UNets have the same one
        "vae": (vae, AutoencoderKL(VaeConfig.from_json(vae))),
        "unet": (unet, Unet(UnetConfig.from_json(unet))),
    }
    for part, (config, module) in result.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        save_file(module.state_dict(), folder / part / "diffusion_pytorch_model.safetensors")
    return folder


def write_text_encoder(folder: Path, part: str, kind: str, **options) -> None:
    import transformers

    tokenizer = part.replace("text_encoder", "tokenizer")
    vocabulary = len(json.loads((folder / tokenizer / "vocab.json").read_text()))
    config = transformers.CLIPTextConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "eos_token_id": vocabulary - 1,
            **options,
        }
    )
    getattr(transformers, kind)(config).save_pretrained(folder / part)


def write_tiny_refiner(folder: Path, embedded: Path, **unet_options) -> Path:
    """Shaped like XL's refiner: the second text encoder alone, 24 wide, a pooled prompt of 20, five
    time ids, and no transformers at the last resolution but in the middle.
    """
    options = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 16, 16],
        "transformer_layers_per_block": 2,
        "attention_head_dim": [2, 4, 4],
        "use_linear_projection": True,
        "cross_attention_dim": 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 60,
    }
    write_tiny_xl(folder, embedded, **{**options, **unet_options})
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    index = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
        "text_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_tiny_xl(folder: Path, embedded: Path, **unet_options) -> Path:
    """Shaped like XL: two text encoders, 16 and 24 wide, and a pooled prompt of 20."""
    options = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "upcast_attention": None,
        "cross_attention_dim": 40,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 68,
    }
    write_tiny(folder, embedded, **{**options, **unet_options})
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    (folder / "tokenizer_2" / "special_tokens_map.json").unlink()
    shutil.rmtree(folder / "text_encoder")
    write_text_encoder(folder, "text_encoder", "CLIPTextModel", num_hidden_layers=2)
    write_text_encoder(
        folder,
        "text_encoder_2",
        "CLIPTextModelWithProjection",
        num_hidden_layers=3,
        hidden_size=24,
        projection_dim=20,
        hidden_act="gelu",
    )
    return folder
