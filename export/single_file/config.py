"""What a single file in the original layout leaves unsaid: its family and its configuration.

Knows published names and shapes, and what all published models of a family share; reads no file.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sdrt.bundle.manifest import REFINER_TIME_IDS, TIME_IDS
from sdrt.errors import CheckpointError

from .parts import ADDED, LATER_TEXT, OPTIONS, PartLocation, seems_to_be

Weights = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
PUBLISHED_SIZE_WIDTH = 256  # of the embedding of one of the sizes that XL is given
OPEN_CLIP_WIDTHS = (1024, 1280)  # of the text encoders of 2.x and the second of XL
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
    index: what diffusers' `model_index.json` says of the model and no shape tells
    """

    name: str
    prefixes: Mapping[str, str]
    open_clip: tuple[str, ...]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_time_ids(self) -> int:
        """Of a UNet that is given sizes."""
        return REFINER_TIME_IDS if "text_encoder" not in self.prefixes else TIME_IDS


XL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "timestep_spacing": "leading",
    **PUBLISHED_SCHEDULE,
}
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
        XL_SCHEDULER,
    ),
    Family(
        "Stable Diffusion XL's refiner",
        {"unet": UNET, "vae": VAE, "text_encoder_2": LATER_TEXT},
        ("text_encoder_2",),
        {"sample_size": 128},
        {"scaling_factor": 0.13025},
        XL_SCHEDULER,
        {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
    ),
)


def family_of(shapes: Shapes, parts_found: Mapping[str, PartLocation]) -> Family:
    """The family of a file by its parts, or of a UNet alone.

    Args:
        shapes: of the file's tensors by their names in it.
        found: where the file has which part.
    """
    first, second, xl, refiner = FAMILIES
    unet, text = parts_found.get("unet"), parts_found.get("text_encoder")
    names = [name for name in shapes if unet and name.startswith(unet.prefix)]
    # 2.x may be in the layout of XL: then that text encoder is all that it has there.
    of_xl = [n for n in shapes if n.startswith("conditioner.") and not n.startswith(LATER_TEXT)]
    if of_xl or any(f".{name}".endswith(ADDED) for name in names):
        later = parts_found.get("text_encoder_2")
        return refiner if later and later.prefix == LATER_TEXT else xl
    if text and (text.layout == "open_clip" or text.prefix.startswith("cond_stage_model.")):
        return second if text.layout == "open_clip" else first
    linear = any(name.endswith("proj_in.weight") and len(shapes[name]) == 2 for name in names)
    return second if linear else first


def check_whole(
    family: Family, parts_found: Mapping[str, PartLocation], keys: Collection[str]
) -> None:
    """Raise CheckpointError for the first part of the family that is neither found nor given,
    saying what was recognised and how to give it.

    parts_found: the parts in the file and those passed next to it
    """
    lacking = [part for part in family.prefixes if part not in parts_found]
    if not lacking:
        return
    have = [f"its {part} ({location.prefix}..)" for part, location in parts_found.items()]
    prefix = family.prefixes[lacking[0]]
    if lacking[0] == "text_encoder" and family is FAMILIES[0]:
        prefixes = [family.prefixes.get("text_encoder") for family in FAMILIES]
        prefix = " or ".join(filter(None, prefixes))
    begun = sorted({name.split(".")[0] for name in keys})[:5]
    advice = [f"{OPTIONS[part]} FILE" for part in lacking]
    what = seems_to_be(keys)
    raise CheckpointError(
        f"this file has no {lacking[0]}: no key begins with {prefix}; recognised "
        f"{', '.join(have) or 'nothing'}, keys begin with {', '.join(begun) or 'nothing'}; "
        + (what or f"give what it lacks with {' '.join(advice)}, or a file of ")
        + ("" if what else ", ".join(family.name for family in FAMILIES))
    )


def configs_of(
    family: Family, parts: Mapping[str, Weights], pooled: int | None = None
) -> dict[str, dict[str, Any]]:
    """The configuration of every part, by published names.

    pooled: how wide the prompt as a whole is, where the second text encoder is not in the parts.
    Raises CheckpointError for a weight that a configuration needs and the file lacks.
    """
    configs: dict[str, dict[str, Any]] = {
        part: text_config(weights, part in (*family.open_clip, "text_encoder_2"))
        for part, weights in parts.items()
        if part.startswith("text_encoder")
    }
    if "vae" in parts:
        config_read = vae_config(parts["vae"])
        tiny = config_read.get("_class_name") == "AutoencoderTiny"
        configs["vae"] = config_read if tiny else {**config_read, **family.vae}
    if "unet" in parts:
        config_read = unet_config(parts["unet"])
        heads = [width // HEAD for width in config_read["block_out_channels"]]
        configs["unet"] = {"attention_head_dim": heads, **config_read, **family.unet}
        if added := config_read.get("projection_class_embeddings_input_dim"):
            width = configs.get("text_encoder_2", {}).get("projection_dim", pooled)
            configs["unet"] |= addition_config(added, width, family.num_time_ids)
    return configs


def addition_config(width: int, pooled: int | None, sizes: int = TIME_IDS) -> dict[str, Any]:
    """Of a UNet that is given the pooled prompt and sizes: how wide the embedding of a size is.

    width: of both together. pooled: of the prompt; None for that of the published models, or where
        the UNet is not theirs for one that is refused for want of a text encoder
    sizes: how many there are
    """
    if pooled is None:
        size_width = min(PUBLISHED_SIZE_WIDTH, (width - 1) // sizes)
    else:
        size_width = (width - pooled) // sizes
    return {"addition_embed_type": "text_time", "addition_time_embed_dim": size_width}


def unet_config(weights: Weights) -> dict[str, Any]:
    """What the weights' names and shapes tell of a UNet."""
    config = encoder_config(weights)
    if "cross_attention_dim" not in config:
        _shape(weights, "attn2.to_k.weight")  # refused: UNets attend to a prompt
    depths = config["transformer_layers_per_block"]
    stages = range(len(depths))
    config |= {
        "out_channels": _shape(weights, "conv_out.weight")[0],
        "up_block_types": [f"{_attends(weights, f'up_blocks.{i}.')}UpBlock2D" for i in stages],
    }
    on_way_up = [_depths(weights, f"up_blocks.{i}.") for i in stages]
    # A stage without transformers has the depth of its counterpart, which nothing reads.
    ways_up = [
        _one(own) if own else down for own, down in zip(on_way_up, depths[::-1], strict=True)
    ]
    if ways_up != depths[::-1]:
        config["reverse_transformer_layers_per_block"] = ways_up
    if "time_embedding.cond_proj.weight" in weights:
        config["time_cond_proj_dim"] = _shape(weights, "time_embedding.cond_proj.weight")[1]
    return config


def encoder_config(weights: Weights) -> dict[str, Any]:
    """What the weights' names and shapes tell of a UNet's way down and its middle."""
    stages = range(_stages(weights, r"down_blocks\.(\d+)\.", "down_blocks.0"))
    widths = [_shape(weights, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in stages]
    down = [_depths(weights, f"down_blocks.{i}.") for i in stages]
    middle = _depths(weights, "mid_block.")
    if not down[-1]:  # the middle has the depth of the last stage
        down[-1] = middle
    config: dict[str, Any] = {
        "in_channels": _shape(weights, "conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": _count(weights, r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": [
            f"{_attends(weights, f'down_blocks.{i}.')}DownBlock2D" for i in stages
        ],
        "transformer_layers_per_block": [_one(depths) for depths in down],
    }
    if any(map(len, down)):
        attention = next((name for name in weights if name.endswith("attn2.to_k.weight")), "attn2")
        project = next((name for name in weights if name.endswith("proj_in.weight")), "proj_in")
        config["cross_attention_dim"] = _shape(weights, attention)[1]
        config["use_linear_projection"] = len(_shape(weights, project)) == 2
    if not middle:
        full = any(name.startswith("mid_block.") for name in weights)
        config["mid_block_type"] = "UNetMidBlock2D" if full else None
    if "add_embedding.linear_1.weight" in weights:
        width = _shape(weights, "add_embedding.linear_1.weight")[1]
        config["projection_class_embeddings_input_dim"] = width
    return config


def vae_config(weights: Weights) -> dict[str, Any]:
    """What the weights' names and shapes tell of an autoencoder."""
    if any(name.startswith("decoder.layers.") for name in weights):
        channels = _shape(weights, "decoder.layers.0.weight")[1]
        return {"_class_name": "AutoencoderTiny", "latent_channels": channels}
    stages = range(_stages(weights, r"encoder\.down_blocks\.(\d+)\.", "encoder.down_blocks.0"))
    name = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    return {
        "block_out_channels": [_shape(weights, name.format(i))[0] for i in stages],
        "layers_per_block": _count(weights, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": _shape(weights, "decoder.conv_in.weight")[1],
    }


def text_config(weights: Weights, open_clip: bool) -> dict[str, Any]:
    """What the weights' names and shapes tell of a text encoder.

    open_clip: whether OpenCLIP trained it, as it did all that are as wide as these
    """
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
        "hidden_act": "gelu" if open_clip or width in OPEN_CLIP_WIDTHS else "quick_gelu",
        "projection_dim": width if projection is None else projection.shape[0],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    """Raises CheckpointError for a weight that is not there, or is a vector."""
    if name not in weights:
        raise CheckpointError(
            f"the file lacks {name}, by its published name; it is not whole, or of an unknown make"
        )
    if weights[name].ndim < 2:
        raise CheckpointError(
            f"{name}, by its published name, is of shape {list(weights[name].shape)}; expected a "
            "matrix or a convolution: the file is of an unknown make"
        )
    return tuple(weights[name].shape)


def _stages(weights: Weights, pattern: str, first: str) -> int:
    """How many stages there are; raises CheckpointError if there is none."""
    _shape(weights, f"{first}.resnets.0.conv1.weight")
    return _count(weights, pattern)


def _count(weights: Weights, pattern: str) -> int:
    """One more than the largest number that a pattern finds at the beginning of a name."""
    matches = (re.match(pattern, name) for name in weights)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


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
