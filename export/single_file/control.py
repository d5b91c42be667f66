"""A ControlNet or T2I-Adapter in one file: converted to a folder as on the hub.

Knows both layouts of ControlNets, and what no shape tells of published ones. A file that is not
fully understood is refused by name.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sdrt.atomic_files import build_once
from sdrt.bundle.manifest import CONTROLNET, T2I_ADAPTER
from sdrt.bundle.safetensors import read_header
from sdrt.bundle.store import home
from sdrt.errors import CheckpointError
from sdrt.export.t2i_adapter import FULL, LIGHT, RGB, XL
from sdrt.export.weights import open_safetensors

from .config import HEAD, addition_config, encoder_config, family_of
from .original_layout import unet_name
from .parts import PartLocation, refuse_unknown, seems_to_be, shapes_nothing
from .quantized import check_used, weights_without_scales

log = logging.getLogger("sdrt.build")
VERSION = 1  # of what is made of a file
PREFIX = "control_model."  # of a ControlNet in the original layout, or none
HINT = "input_hint_block."
PUBLISHED_CONTEXT = {False: 768, True: 2048}  # of nets that do not attend; by whether they are XL's
POOLING = "shuffle"  # in the names of the published nets whose residuals are pooled
# What is not read here, by what the names of its tensors hold.
UNSUPPORTED = (
    (r"lora_controlnet|.*\.lora_(up|down|A|B)\.|.*\.(up|down)$", "a Control-LoRA"),
    (r"lllite_", "a ControlNet-LLLite"),
    (r"(.*\.)?(task_embedding|control_add_embedding|transformer_layes)", "a union ControlNet"),
    (r"(controlnet_x_embedder|pos_embed_input|transformer_blocks)\.", "a transformer's ControlNet"),
    (r".*(ctrl_to_base|base_to_ctrl)", "a ControlNet-XS"),
)
SUPPORTED = (
    "supported are ControlNets of Stable Diffusion 1.x, 2.x and XL, one condition each, and "
    "T2I-Adapters"
)
Weights = dict[str, Tensor]


def folder_from_control_file(path: Path) -> Path:
    """A folder with configuration and weights of a file's net, stored in sdrt's home.

    Raises:
        CheckpointError: The file holds none, or one that is not fully understood.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    records = read_header(path, CheckpointError).records
    refuse_unsupported(records, str(path))
    kind = find_kind(records)
    if kind is None:
        what = seems_to_be(records) or f"keys begin with {', '.join(sorted(records)[:3])}"
        raise CheckpointError(f"{path} holds no ControlNet or T2I-Adapter: {what}", hint=SUPPORTED)
    stat = path.stat()
    mark = f"{kind}:{VERSION}:{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    place = home() / "converted" / hashlib.sha256(mark.encode()).hexdigest()[:16]
    return build_once(place, partial(_convert, kind, path))


def refuse_unsupported(keys: Collection[str], where: str) -> None:
    """Raise CheckpointError for nets of other designs, by their names."""
    for pattern, what in UNSUPPORTED:
        match = next((key for key in keys if re.match(pattern, key)), None)
        if match:
            raise CheckpointError(f"{where} is {what}: it holds {match}", hint=SUPPORTED)


def find_kind(keys: Collection[str]) -> str | None:
    """Which net a file of these names holds."""
    names = {key.removeprefix(PREFIX) for key in keys}
    if any(name.startswith((HINT, "zero_convs.", "controlnet_down_blocks.")) for name in names):
        return CONTROLNET
    adapter = re.compile(r"(adapter\.)?body\.\d+\.resnets\.\d+\.block1\.")
    return T2I_ADAPTER if any(map(adapter.match, names)) else None


def _convert(kind: str, path: Path, folder: Path) -> None:
    with open_safetensors(path) as opened:
        stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    plain = weights_without_scales(_own(stored, kind))
    check_used(plain.items(), str(path))
    convert = controlnet_weights if kind == CONTROLNET else _adapter_weights
    weights = convert(plain, str(path))
    config = controlnet_config(weights) if kind == CONTROLNET else adapter_config(weights)
    if kind == CONTROLNET and POOLING in path.stem.lower():
        log.info("%s: its name says shuffle, so its residuals are pooled over the image", path)
        config["global_pool_conditions"] = True
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )


def _own(stored: Mapping[str, Tensor], kind: str) -> Weights:
    """A net's tensors without their prefix; a full checkpoint holds its base model too."""
    own = {key: tensor for key, tensor in stored.items() if key.startswith(PREFIX)}
    if kind == T2I_ADAPTER or not own:
        return {key: tensor for key, tensor in stored.items() if not shapes_nothing(key)}
    return {key.removeprefix(PREFIX): tensor for key, tensor in own.items()}


def controlnet_weights(weights: Mapping[str, Tensor], where: str) -> Weights:
    """A ControlNet's weights under their published names.

    Raises:
        CheckpointError: There are others.
    """
    if not any(name.startswith(HINT) for name in weights):
        return dict(weights)
    layers = sorted({int(n.split(".")[1]) for n in weights if n.startswith(HINT)})
    renamed = {name: _published_name(name, layers) for name in weights}
    refuse_unknown([name for name, new in renamed.items() if new is None], where)
    return {str(renamed[name]): tensor for name, tensor in weights.items()}


def _published_name(name: str, hint_layers: list[int]) -> str | None:
    """hint_layers: numbers of the layers that embed the control image, every second of which
    activates.
    """
    if match := re.fullmatch(r"input_hint_block\.(\d+)\.(weight|bias)", name):
        place = hint_layers.index(int(match[1]))
        outer = {0: "conv_in", len(hint_layers) - 1: "conv_out"}
        layer = outer.get(place, f"blocks.{place - 1}")
        return f"controlnet_cond_embedding.{layer}.{match[2]}"
    if match := re.fullmatch(r"zero_convs\.(\d+)\.0\.(weight|bias)", name):
        return f"controlnet_down_blocks.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"middle_block_out\.0\.(weight|bias)", name):
        return f"controlnet_mid_block.{match[1]}"
    return unet_name(name)


def controlnet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights' names and shapes tell of a ControlNet, and what its family shares."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    family = family_of(shapes, {"unet": PartLocation("unet", "", "diffusers")})
    config = encoder_config(weights)
    added = config.get("projection_class_embeddings_input_dim")
    config.setdefault("cross_attention_dim", PUBLISHED_CONTEXT[bool(added)])
    heads = [width // HEAD for width in config["block_out_channels"]]
    unread = {"sample_size"}
    config = {
        "attention_head_dim": heads,
        **config,
        **{key: value for key, value in family.unet.items() if key not in unread},
    }
    embedding = [f"controlnet_cond_embedding.{end}.weight" for end in ("conv_in", "conv_out")]
    if missing := [name for name in embedding if name not in shapes]:
        raise CheckpointError(f"the ControlNet lacks {missing[0]}, by its published name")
    widths = [shapes[embedding[0]][0]]
    while (name := f"controlnet_cond_embedding.blocks.{2 * len(widths) - 1}.weight") in shapes:
        widths.append(shapes[name][0])
    config["conditioning_embedding_out_channels"] = widths
    config["conditioning_channels"] = shapes[embedding[0]][1]
    if added:
        config |= addition_config(added, None)
    return {"_class_name": "ControlNetModel", **config}


def _adapter_weights(weights: Mapping[str, Tensor], _: str) -> Weights:
    return {
        name if name.startswith("adapter.") else f"adapter.{name}": tensor
        for name, tensor in weights.items()
    }


def adapter_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights' names and shapes tell of a T2I-Adapter."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    numbers = [int(m[1]) for n in shapes if (m := re.match(r"adapter\.body\.(\d+)\.", n))]
    light = "adapter.conv_in.weight" not in shapes
    first = "adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight"
    end = "out_conv" if light else "resnets.0.block1"
    names = [f"adapter.body.{i}.{end}.weight" for i in range(max(numbers) + 1)]
    if missing := [name for name in (first, *names) if name not in shapes]:
        raise CheckpointError(f"the T2I-Adapter lacks {missing[0]}, by its published name")
    channels = [shapes[name][0] for name in names]
    blocks = [n for n in shapes if re.match(r"adapter\.body\.0\.resnets\.\d+\.block1\.weight", n)]
    factor = {RGB * 256: 16, 256: 16}.get(shapes[first][1], 8)
    return {
        "_class_name": "T2IAdapter",
        "in_channels": shapes[first][1] // factor**2,
        "channels": channels[:-1] if light else channels,
        "num_res_blocks": len(blocks),
        "downscale_factor": factor,
        "adapter_type": LIGHT if light else XL if factor == 16 else FULL,
    }
