"""A single `.safetensors` file in the original key layout of Stable Diffusion 1.x.

Knows both layouts' names. The file holds weights only: the configuration is the published one of
1.x, and the tokenizer comes from a `tokenizer` folder beside the file, or from the hub.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sdrt.bundle import home
from sdrt.errors import CheckpointError

TOKENIZER_SOURCE = "openai/clip-vit-large-patch14"
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
SCHEDULER_CONFIG = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
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
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
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
        r"mid\.attn_1\.(\w+)", lambda m: f"mid_block.attentions.0.{VAE_ATTENTION[m[1]]}", name
    )
    name = re.sub(r"down\.(\d)\.block\.(\d)", r"down_blocks.\1.resnets.\2", name)
    name = re.sub(r"down\.(\d)\.downsample\.", r"down_blocks.\1.downsamplers.0.", name)
    name = re.sub(
        r"up\.(\d)\.block\.(\d)", lambda m: f"up_blocks.{3 - int(m[1])}.resnets.{m[2]}", name
    )
    return re.sub(
        r"up\.(\d)\.upsample\.", lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0.", name
    )


def converted(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts' weights under their published names; raises CheckpointError for another make."""
    rename = {"unet": unet_name, "vae": vae_name, "text_encoder": lambda name: name}
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    for key, tensor in tensors.items():
        for part, prefix in PREFIXES.items():
            if key.startswith(prefix):
                name = rename[part](key.removeprefix(prefix))
                if name and not name.endswith("position_ids") and not name.startswith("loss"):
                    squeeze = part == "vae" and ".attentions." in name and tensor.ndim == 4
                    parts[part][name] = tensor[:, :, 0, 0].contiguous() if squeeze else tensor
    for part, weights in parts.items():
        if not weights:
            raise CheckpointError(
                f"this file has no {part}: no key begins with {PREFIXES[part]}; expected a "
                "Stable Diffusion 1.x checkpoint in the original layout"
            )
    return parts


def checkpoint_from_file(path: Path) -> Path:
    """A folder in the hub's layout with the file's weights, kept in sdrt's home."""
    from .checkpoint import read_safetensors

    mark = f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}"
    folder = home() / "converted" / hashlib.sha256(mark.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    parts = converted(read_safetensors(path))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, parts, path)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path, parts: dict[str, dict[str, Tensor]], source: Path) -> None:
    _copy_tokenizer(source.parent / "tokenizer", folder / "tokenizer")
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG))
    configs = {"unet": {}, "vae": {}, "text_encoder": TEXT_CONFIG}
    for part, weights in parts.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(weights, folder / part / f"{stem}.safetensors")


def _copy_tokenizer(beside: Path, target: Path) -> None:
    names = ("vocab.json", "merges.txt")
    target.mkdir(parents=True)
    if all((beside / name).is_file() for name in names):
        for name in names:
            shutil.copyfile(beside / name, target / name)
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        for name in names:
            shutil.copyfile(hf_hub_download(TOKENIZER_SOURCE, name), target / name)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"a single file holds no tokenizer, and {TOKENIZER_SOURCE} cannot be fetched: put its "
            f"vocab.json and merges.txt into {beside}"
        ) from error
