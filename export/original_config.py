"""What a single file in the original layout leaves unsaid: its family and its configuration.

Knows published names and shapes, and what all published models of a family share; reads no file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdrt.errors import CheckpointError

Weights = Mapping[str, Tensor]
HEAD = 64  # channels of an attention head; all but 1.x have heads of one width
UNET, VAE = "model.diffusion_model.", "first_stage_model."
PUBLISHED_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
ALL_ALPHAS = {**PUBLISHED_SCHEDULE, "set_alpha_to_one": False, "skip_prk_steps": True}


@dataclass(frozen=True, slots=True)
class Family:
    """What the files of a family share.

    prefixes: of each part's keys. open_clip: parts in OpenCLIP's layout, whose prompts are padded
        with "!"
    unet, vae: configuration that no shape tells
    """

    name: str
    prefixes: Mapping[str, str]
    open_clip: tuple[str, ...]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]


FAMILIES = (
    Family(
        "Stable Diffusion 1.x",
        {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
        (),
        {"sample_size": 64, "attention_head_dim": 8},
        {"scaling_factor": 0.18215},
        {"_class_name": "PNDMScheduler", **ALL_ALPHAS},
    ),
    Family(
        "Stable Diffusion 2.x",
        {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.model."},
        ("text_encoder",),
        {"sample_size": 64, "upcast_attention": True},
        {"scaling_factor": 0.18215},
        {"_class_name": "DDIMScheduler", **ALL_ALPHAS},
    ),
    Family(
        "Stable Diffusion XL",
        {
            "unet": UNET,
            "vae": VAE,
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        },
        ("text_encoder_2",),
        {"sample_size": 128},
        {"scaling_factor": 0.13025},
        {
            "_class_name": "EulerDiscreteScheduler",
            "timestep_spacing": "leading",
            **PUBLISHED_SCHEDULE,
        },
    ),
)


def family_of(keys: Iterable[str]) -> Family:
    """The family of a file by its keys; raises CheckpointError, saying what was recognised."""
    names = list(keys)

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    first, second, xl = FAMILIES
    text = [each.prefixes["text_encoder"] for each in FAMILIES]
    family = xl if has("conditioner.") else second if has(text[1]) else first
    lacking = [part for part, prefix in family.prefixes.items() if not has(prefix)]
    if not lacking:
        return family
    have = [f"its {part} ({p}..)" for part, p in family.prefixes.items() if part not in lacking]
    prefix = family.prefixes[lacking[0]]
    if lacking[0] == "text_encoder" and family is first:
        prefix = " or ".join(text)
    begun = sorted({name.split(".")[0] for name in names})[:5]
    raise CheckpointError(
        f"this file has no {lacking[0]}: no key begins with {prefix}; recognised "
        f"{', '.join(have) or 'nothing'}, keys begin with {', '.join(begun) or 'nothing'}; "
        f"expected {', '.join(each.name for each in FAMILIES)} in the original layout"
    )


def configs_of(
    family: Family, parts: Mapping[str, Weights], predicts: str | None
) -> dict[str, dict[str, Any]]:
    """The configuration of every part and of the scheduler, by published names.

    predicts: epsilon or v_prediction if the file says so. Raises CheckpointError for a weight that
    a configuration needs and the file lacks.
    """
    unet = {**unet_config(parts["unet"]), **family.unet}
    if "attention_head_dim" not in family.unet:
        unet["attention_head_dim"] = [width // HEAD for width in unet["block_out_channels"]]
    # Files of 2.x do not tell; those that only take latents are mostly the ones for 768 pixels.
    if family.name.endswith("2.x") and unet["in_channels"] == 4:
        predicts = predicts or "v_prediction"
        unet["sample_size"] = 96 if predicts == "v_prediction" else 64
    encoders = {
        part: text_config(weights, "gelu" if part in family.open_clip else "quick_gelu")
        for part, weights in parts.items()
        if part.startswith("text_encoder")
    }
    if added := unet.get("projection_class_embeddings_input_dim"):
        pooled = encoders.get("text_encoder_2", {}).get("projection_dim", 0)
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added - pooled) // 6,
        }
    scheduler = {**family.scheduler, "prediction_type": predicts or "epsilon"}
    vae = {**vae_config(parts["vae"]), **family.vae}
    return {"unet": unet, "vae": vae, **encoders, "scheduler": scheduler}


def unet_config(weights: Weights) -> dict[str, Any]:
    """What the weights' names and shapes tell of a UNet."""
    stages = range(_count(weights, r"down_blocks\.(\d+)\."))
    widths = [_shape(weights, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in stages]
    down = [_depths(weights, f"down_blocks.{i}.") for i in stages]
    up = [_depths(weights, f"up_blocks.{i}.") for i in stages]
    middle = _depths(weights, "mid_block.")
    if not down[-1]:  # the middle has the depth of the last stage
        down[-1] = middle
    attention = next((name for name in weights if name.endswith("attn2.to_k.weight")), "attn2")
    project = next((name for name in weights if name.endswith("proj_in.weight")), "proj_in.weight")
    config = {
        "in_channels": _shape(weights, "conv_in.weight")[1],
        "out_channels": _shape(weights, "conv_out.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": _count(weights, r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": [
            f"{_attends(weights, f'down_blocks.{i}.')}DownBlock2D" for i in stages
        ],
        "up_block_types": [f"{_attends(weights, f'up_blocks.{i}.')}UpBlock2D" for i in stages],
        "cross_attention_dim": _shape(weights, attention)[1],
        "use_linear_projection": len(_shape(weights, project)) == 2,
        "transformer_layers_per_block": [_one(depths) for depths in down],
    }
    if (ways_up := [_one(depths) for depths in up]) != [_one(depths) for depths in down[::-1]]:
        config["reverse_transformer_layers_per_block"] = ways_up
    if not middle:
        whole = any(name.startswith("mid_block.") for name in weights)
        config["mid_block_type"] = "UNetMidBlock2D" if whole else None
    if "add_embedding.linear_1.weight" in weights:
        width = _shape(weights, "add_embedding.linear_1.weight")[1]
        config["projection_class_embeddings_input_dim"] = width
    return config


def vae_config(weights: Weights) -> dict[str, Any]:
    """What the weights' names and shapes tell of an autoencoder."""
    stages = range(_count(weights, r"encoder\.down_blocks\.(\d+)\."))
    name = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    return {
        "block_out_channels": [_shape(weights, name.format(i))[0] for i in stages],
        "layers_per_block": _count(weights, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": _shape(weights, "post_quant_conv.weight")[1],
    }


def text_config(weights: Weights, activation: str) -> dict[str, Any]:
    """What the weights' names and shapes tell of a text encoder."""
    start = "text_model." if any(name.startswith("text_model.") for name in weights) else ""
    vocabulary, width = _shape(weights, f"{start}embeddings.token_embedding.weight")
    projection = weights.get("text_projection.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(weights, f"{start}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(weights, r".*encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": _shape(weights, f"{start}embeddings.position_embedding.weight")[
            0
        ],
        "hidden_act": activation,
        "projection_dim": width if projection is None else projection.shape[0],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    if name not in weights:
        raise CheckpointError(
            f"the file lacks {name}, by its published name; it is not whole, or of an unknown make"
        )
    return tuple(weights[name].shape)


def _count(weights: Weights, pattern: str) -> int:
    """One more than the largest number that a pattern finds at the beginning of a name."""
    found = (re.match(pattern, name) for name in weights)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _depths(weights: Weights, block: str) -> list[int]:
    """Transformer blocks of each of a block's transformers."""
    at = re.escape(block) + r"attentions\."
    count = _count(weights, at + r"(\d+)\.")
    return [_count(weights, rf"{at}{i}\.transformer_blocks\.(\d+)\.") for i in range(count)]


def _one(depths: list[int]) -> int | list[int]:
    """The depth of all, if they agree; 1 if there are none."""
    return depths if len(set(depths)) > 1 else next(iter(depths), 1)


def _attends(weights: Weights, block: str) -> str:
    return "CrossAttn" if _depths(weights, block) else ""
