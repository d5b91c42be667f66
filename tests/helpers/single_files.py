"""Models of a few thousand random weights as single files.

The way into the original layout is written independently of the code under test.
"""

import re

import torch

from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig
from sdrt.export.vae import AutoencoderKL, VaeConfig


def original_vae_name(name):
    """The other direction, written independently of the code under test."""
    if "quant_conv" in name:
        return name
    side, _, rest = name.partition(".")
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for i in range(4):
        for j in range(3):
            rest = rest.replace(f"down_blocks.{i}.resnets.{j}", f"down.{i}.block.{j}")
            rest = rest.replace(f"up_blocks.{i}.resnets.{j}", f"up.{3 - i}.block.{j}")
        rest = rest.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
        rest = rest.replace(f"up_blocks.{i}.upsamplers.0", f"up.{3 - i}.upsample")
    rest = rest.replace("mid_block.resnets.0", "mid.block_1").replace(
        "mid_block.resnets.1", "mid.block_2"
    )
    for new, old in {
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "group_norm": "norm",
    }.items():
        rest = rest.replace(f"mid_block.attentions.0.{new}", f"mid.attn_1.{old}")
    return f"{side}.{rest}"


PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    ("1.x", "text_encoder"): "cond_stage_model.transformer.",
    ("2.x", "text_encoder"): "cond_stage_model.model.",
    ("XL", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("XL", "text_encoder_2"): "conditioner.embedders.1.model.",
    ("refiner", "text_encoder_2"): "conditioner.embedders.0.model.",
}
SUFFIXES = {
    "time_embedding.linear_": "time_embed.",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_": "label_emb.0.",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet_name(name, names):
    """The other direction for two layers a block; names: all, to see which blocks attend."""
    for new, old in SUFFIXES.items():
        if name.startswith(new):
            stem, kind = name.rsplit(".", 1)
            last = str(2 * (int(stem[-1]) - 1)) if stem[-1].isdigit() else ""
            return f"{old}{last}.{kind}"
    side, *rest = re.fullmatch(r"(\w+_block)(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name).groups()
    block, part, layer, inner = int(rest[0] or 0), rest[1], int(rest[2]), rest[3]
    if part == "resnets":
        stem, kind = inner.rsplit(".", 1)
        inner = f"{INNER[stem]}.{kind}"
    slot = 0 if part == "resnets" else 1
    if side == "mid_block":
        return f"middle_block.{2 * layer if part == 'resnets' else 1}.{inner}"
    if part == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.{inner.replace('conv', 'op')}"
    if part == "upsamplers":
        attends = any(n.startswith(f"up_blocks.{block}.attentions") for n in names)
        return f"output_blocks.{3 * block + 2}.{1 + attends}.{inner}"
    if side == "down_block":
        return f"input_blocks.{3 * block + layer + 1}.{slot}.{inner}"
    return f"output_blocks.{3 * block + layer}.{slot}.{inner}"


def original_text(weights):
    """A text encoder in OpenCLIP's layout."""
    result = {}
    for name, tensor in weights.items():
        bare = name.removeprefix("text_model.")
        if "self_attn" in bare and "out_proj" not in bare:
            kind = bare.rsplit(".", 1)[1]
            key = bare.replace("encoder.layers", "transformer.resblocks")
            key = re.sub(r"self_attn\.[qkv]_proj\..*", f"attn.in_proj_{kind}", key)
            three = [weights[re.sub(r"[qkv]_proj", f"{x}_proj", name)] for x in "qkv"]
            result[key] = torch.cat(three)
            continue
        for new, old in {
            "encoder.layers": "transformer.resblocks",
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "self_attn": "attn",
            "fc1": "c_fc",
            "fc2": "c_proj",
            "final_layer_norm": "ln_final",
            "embeddings.token_embedding": "token_embedding",
            "embeddings.position_embedding.weight": "positional_embedding",
            "text_projection.weight": "text_projection",
        }.items():
            bare = bare.replace(new, old)
        result[bare] = tensor.T.contiguous() if bare == "text_projection" else tensor
    return result


UNETS = {
    "1.x": {"attention_head_dim": 8, "cross_attention_dim": 64},
    "1.x inpainting": {"attention_head_dim": 8, "cross_attention_dim": 64, "in_channels": 9},
    "1.x distilled": {
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
        "time_cond_proj_dim": 32,
    },
    "2.x": {"use_linear_projection": True, "upcast_attention": True, "cross_attention_dim": 64},
    "2.x depth": {
        "use_linear_projection": True,
        "upcast_attention": True,
        "cross_attention_dim": 64,
        "in_channels": 5,
        "sample_size": 64,
    },
    "XL": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 192,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 112,
    },
    "refiner": {
        "block_out_channels": (64, 128, 128),
        "attention_head_dim": (1, 2, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 128,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 104,
    },
    "XL, unlike depths": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, (2, 1)),
        "reverse_transformer_layers_per_block": ((3, 1, 2), 1),
        "mid_block_type": "UNetMidBlock2D",
        "use_linear_projection": True,
        "cross_attention_dim": 192,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 112,
    },
}
SAMPLE_SIZES = {"1.x": 64, "2.x": 96, "XL": 128, "refiner": 128}


def text_config(vocabulary, **options):
    return {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        **options,
    }


def tiny_parts(case, vocabulary):
    """(configuration, weights) of every part, with channels that fit all published heads."""
    import transformers

    torch.manual_seed(0)
    family = case.split()[0].removesuffix(",")
    unet = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "sample_size": SAMPLE_SIZES[family],
        **UNETS[case],
    }
    vae = {"block_out_channels": [32] * 4, "layers_per_block": 1}
    vae["scaling_factor"] = 0.13025 if family in ("XL", "refiner") else 0.18215
    open_clip = {"hidden_act": "gelu", "num_hidden_layers": 3}
    texts = {"text_encoder": text_config(vocabulary, **(open_clip if family == "2.x" else {}))}
    if family in ("XL", "refiner"):
        wide = {**open_clip, "hidden_size": 128, "num_attention_heads": 2, "projection_dim": 64}
        texts["text_encoder_2"] = text_config(vocabulary, **wide)
    if family == "refiner":
        del texts["text_encoder"]
    parts = {
        "unet": (unet, Unet(UnetConfig(**unet)).state_dict()),
        "vae": (vae, AutoencoderKL(VaeConfig.from_json(vae)).state_dict()),
    }
    for part, config in texts.items():
        kind = "CLIPTextModel" + ("WithProjection" if part == "text_encoder_2" else "")
        weights = getattr(transformers, kind)(transformers.CLIPTextConfig(**config)).state_dict()
        named = {
            n if n.startswith(("text_model.", "text_proj")) else f"text_model.{n}": t
            for n, t in weights.items()
        }
        parts[part] = (config, named)
    return family, parts


def single_file(family, parts):
    """Every part's weights under the original names."""
    tensors = {"model_ema.decay": torch.ones(1)}
    for part, (_, weights) in parts.items():
        if part == "unet":
            own = {original_unet_name(n, weights): t for n, t in weights.items()}
        elif part == "vae":
            own = {
                original_vae_name(n): t[:, :, None, None]
                if ".attentions." in n and t.ndim == 2
                else t
                for n, t in weights.items()
            }
        elif part == "text_encoder_2" or family == "2.x":
            own = {**original_text(weights), "logit_scale": torch.ones(())}
        else:
            own = {**weights, "text_model.embeddings.position_ids": torch.arange(32)[None]}
        prefix = PREFIX.get(part) or PREFIX[family, part]
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in own.items()}
    if family == "2.x":  # what 2.x leaves unread
        layer = "cond_stage_model.model.transformer.resblocks.23"
        tensors |= {
            f"{layer}.ln_1.weight": torch.ones(64),
            f"{layer[:-24]}text_projection": torch.ones(64, 8),
        }
    return tensors
