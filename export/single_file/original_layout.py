"""The names of Stable Diffusion 1.x, 2.x and XL in the original layout, and the published ones.

Knows both layouts' names; `single_file_config.py` tells the families apart. The file holds weights
only: the tokenizer comes from a `tokenizer` folder next to the file, or from the hub.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdrt.errors import CheckpointError
from sdrt.export.tokenizer import missing_files
from sdrt.export.weights import read_json

from .config import Family, check_whole, family_of
from .parts import LAYERS_READ, PartLocation, find_parts, shapes_nothing_of

TOKENIZER_SOURCE = "openai/clip-vit-large-patch14"
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def unet_name(name: str) -> str | None:
    """The published name of an original UNet weight, or None if there is none."""
    stem, _, kind = name.rpartition(".")
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{kind}"
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)", name)
    if not match:
        return None
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle_block":
        place = "attentions.0" if number == 1 else f"resnets.{number // 2}"
        return f"mid_block.{place}.{_inner(rest)}"
    slot, _, rest = rest.partition(".")
    if side == "input_blocks":
        block, layer = divmod(number - 1, 3)
        if layer == 2:
            return f"down_blocks.{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        part = "resnets" if slot == "0" else "attentions"
        return f"down_blocks.{block}.{part}.{layer}.{_inner(rest)}"
    block, layer = divmod(number, 3)
    if rest.startswith("conv."):
        return f"up_blocks.{block}.upsamplers.0.{rest}"
    part = "resnets" if slot == "0" else "attentions"
    return f"up_blocks.{block}.{part}.{layer}.{_inner(rest)}"


def _inner(rest: str) -> str:
    stem, _, kind = rest.rpartition(".")
    return f"{RESNET[stem]}.{kind}" if stem in RESNET else rest


def vae_name(name: str) -> str | None:
    """The published name of an original autoencoder weight, or None if there is none."""
    if name.startswith(("quant_conv", "post_quant_conv")):
        return name
    name = name.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    name = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
    name = re.sub(
        r"mid\.attn_1\.(\w+)",
        lambda m: f"mid_block.attentions.0.{VAE_ATTENTION.get(m[1], m[1])}",
        name,
    )
    name = re.sub(r"down\.(\d)\.block\.(\d)", r"down_blocks.\1.resnets.\2", name)
    name = re.sub(r"down\.(\d)\.downsample\.", r"down_blocks.\1.downsamplers.0.", name)
    name = re.sub(
        r"up\.(\d)\.block\.(\d)", lambda m: f"up_blocks.{3 - int(m[1])}.resnets.{m[2]}", name
    )
    return re.sub(
        r"up\.(\d)\.upsample\.", lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0.", name
    )


def open_clip_weights(tensors: Mapping[str, Tensor], projects: bool) -> dict[str, Tensor]:
    """OpenCLIP's text encoder under transformers' names: its fused query, key and value in thirds.

    projects: keep the projection of the prompt as a whole, and every layer
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in OPEN_CLIP_ENDS:
            result[f"text_model.{OPEN_CLIP_ENDS[name]}"] = tensor
        elif name == "text_projection" and projects:
            result["text_projection.weight"] = tensor.T.contiguous()
        elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name):
            layer = f"text_model.encoder.layers.{match[1]}"
            if int(match[1]) >= LAYERS_READ and not projects:
                continue
            if match[2] == "attn.in_proj":
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    result[f"{layer}.self_attn.{letter}_proj.{match[3]}"] = part.clone()
            elif match[2] in OPEN_CLIP_LAYER:
                result[f"{layer}.{OPEN_CLIP_LAYER[match[2]]}.{match[3]}"] = tensor
    return result


def modern_name(name: str) -> str:
    """Early checkpoints call attention layers over positions query, key, value and proj_attn."""
    head, _, tail = name.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{OLD_ATTENTION[last]}.{tail}" if last in OLD_ATTENTION else name


def vae_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder under published names, its attention's 1x1 convolutions as linear layers."""
    result = {}
    for key, tensor in tensors.items():
        if name := vae_name(key):
            result[name] = _without_pixels(name, tensor)
    return result


def converted(tensors: Mapping[str, Tensor]) -> tuple[Family, dict[str, dict[str, Tensor]]]:
    """The family of a whole model's tensors, and its parts' weights under their published names;
    raises CheckpointError for another make.
    """
    actual = find_parts(tensors)
    family = family_of({name: tuple(t.shape) for name, t in tensors.items()}, actual)
    check_whole(family, actual, tensors)

    def of(place: PartLocation) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(place.prefix)
            if key.startswith(place.prefix) and not shapes_nothing_of(place.part, name, False):
                result |= published_weights(place, name, tensor)
        return result

    return family, {part: of(actual[part]) for part in family.prefixes}


def published_weights(place: PartLocation, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor under its published names, of which it may have several; none if none is known.

    name: behind the part's prefix
    """
    if place.part == "unet":
        new = unet_name(name) if place.layout == "original" else name
        return {new: tensor} if new else {}
    if place.part == "vae":
        if place.layout == "original":
            return vae_weights({name: tensor})
        return {modern_name(name): _without_pixels(name, tensor)}
    if place.layout == "open_clip":
        return open_clip_weights({name: tensor}, projects=place.part == "text_encoder_2")
    full = name.startswith(("text_model.", "text_projection."))
    return {name if full else f"text_model.{name}": tensor}


def _without_pixels(name: str, tensor: Tensor) -> Tensor:
    """An attention's 1x1 convolution as the linear layer that it is."""
    squeeze = ".attentions." in name and tensor.ndim == 4
    return tensor[:, :, 0, 0].contiguous() if squeeze else tensor


def copy_tokenizers(family: Family, neighbour: Path, folder: Path) -> None:
    """The tokenizer of every text encoder: all read the same tokens, and pad with their own."""
    from sdrt.export.weights import TOKENIZERS

    for part, name in TOKENIZERS.items():
        if part in family.prefixes:
            _copy_tokenizer(neighbour, folder / name)
            if part in family.open_clip:
                config = folder / name / "tokenizer_config.json"
                settings = read_json(config) if config.is_file() else {}
                config.write_text(json.dumps({**settings, "pad_token": "!"}))


def _copy_tokenizer(neighbour: Path, target: Path) -> None:
    names = ("vocab.json", "merges.txt")
    target.mkdir(parents=True)
    if not missing_files(neighbour):
        more = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
        for path in (neighbour / name for name in (*names, *more)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        for name in names:
            shutil.copyfile(hf_hub_download(TOKENIZER_SOURCE, name), target / name)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"a single file holds no tokenizer, and {TOKENIZER_SOURCE} cannot be fetched: put its "
            f"tokenizer.json, or its vocab.json and merges.txt into {neighbour}"
        ) from error
