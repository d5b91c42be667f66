"""A model, or a part of one, in a single `.safetensors` file: converted to a folder as on the hub.

Reads the tensors that shape the result and no others. A file that is not fully understood is
refused by name; what shapes nothing is passed over, and listed in the folder's notes.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdrt.atomic_files import build_once
from sdrt.bundle.safetensors import Header, read_header
from sdrt.bundle.store import home
from sdrt.errors import CheckpointError
from sdrt.export.prediction import Prediction, prediction_from_marks
from sdrt.export.weights import open_safetensors, read_json

from .config import FAMILIES, Family, check_whole, configs_of, family_of
from .original_layout import copy_tokenizers, published_weights
from .parts import (
    LATER_TEXT,
    OPTIONS,
    PartLocation,
    described,
    find_part_in,
    find_parts,
    refuse_unknown,
    seems_to_be,
    shapes_nothing,
    shapes_nothing_of,
)
from .quantized import check_used, weights_without_scales

LATENT_CHANNELS = 4  # of Stable Diffusion 1.x, 2.x and XL
VERSION = 3  # of what is made of a file: folders that an earlier one made are not used
NOTES = "notes.json"
SCALE_TOLERANCE = 1e-4
# What no shape tells, by part: it is taken from the model that a part is given to.
INHERITED = {
    "unet": (
        "sample_size",
        "attention_head_dim",
        "upcast_attention",
        "norm_num_groups",
        "norm_eps",
    ),
    "vae": ("scaling_factor", "norm_num_groups", "sample_size", "force_upcast"),
    "text": (
        *("hidden_act", "layer_norm_eps", "num_attention_heads"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    ),
}
TEXT_WEIGHT = re.compile(
    r"text_projection\.weight|text_model\.(embeddings\.(token|position)_embedding\.weight"
    r"|(final_layer_norm|encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]"
    r"|layer_norm[12]))\.(weight|bias))"
)
WIDTH_OF_OPEN_CLIP_H = 1024  # the text encoder of 2.x


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A file's header and what it holds. prediction: what its marks say, if anything"""

    path: Path
    header: Header
    parts: Mapping[str, PartLocation]
    family: Family
    prediction: Prediction | None

    @property
    def mark(self) -> str:
        """What changes when the file does."""
        stat = self.path.stat()
        return f"{VERSION}:{self.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"

    def known_of(self, part: str) -> dict[str, Any]:
        """The configuration that a part of this model has whatever its weights are, and for a UNet
        the `projection_dim` of the second text encoder if the file has one.
        """
        if part.startswith("text_encoder"):
            return {"hidden_act": "gelu" if part in self.family.open_clip else "quick_gelu"}
        if part == "vae":
            return dict(self.family.vae)
        second = self.parts.get("text_encoder_2")
        suffix = {"open_clip": "text_projection", "transformers": "text_projection.weight"}
        record = self.header.records.get(second.prefix + suffix[second.layout]) if second else None
        width = record.shape[-1 if second and second.layout == "open_clip" else 0] if record else 0
        known = {**self.family.unet, **({"projection_dim": width} if width else {})}
        if self.sizes_follow:
            known["sample_size"] = self.settled_prediction().sample_size
        return known

    def settled_prediction(self) -> Prediction:
        """What its marks say, or else what models of the family mostly do."""
        if self.prediction:
            return self.prediction
        text = self.parts.get("text_encoder")
        if self.sizes_follow and text and text.prefix == LATER_TEXT:
            advice = "if images are noise, build with --prediction-type v_prediction"
            return Prediction(
                "epsilon", False, f"2.x in the layout of XL, as SD-Turbo is; {advice}"
            )
        if self.sizes_follow:
            advice = "if images are noise, build with --prediction-type epsilon"
            return Prediction(
                "v_prediction", False, f"2.x without a mark, taken as for 768 pixels; {advice}"
            )
        return Prediction("epsilon", False, f"{self.family.name} without a mark")

    @property
    def sizes_follow(self) -> bool:
        """Whether its native size is known by what it predicts: 2.x that takes latents alone."""
        unet = self.parts.get("unet")
        name = {"original": "input_blocks.0.0.weight", "diffusers": "conv_in.weight"}
        record = self.header.records.get(unet.prefix + name[unet.layout]) if unet else None
        return self.family.name.endswith("2.x") and (not record or record.shape[1] == 4)


def open_file(path: Path) -> SingleFile:
    """Read the header; raises CheckpointError: missing, damaged, parameterized as nothing here."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    header = read_header(path, CheckpointError)
    parts = find_parts(header.records)
    shapes = {name: record.shape for name, record in header.records.items()}
    family = family_of(shapes, parts)
    step = None
    if "global_step" in header.records:
        with open_safetensors(path) as file:
            values = file.get_tensor("global_step").flatten()
        step = float(values[0]) if values.numel() == 1 else None
    open_clip = family.name.endswith("2.x")
    prediction = prediction_from_marks(set(shapes), header.metadata, step, open_clip)
    return SingleFile(path, header, parts, family, prediction)


def folder_from_file(file: SingleFile, others: Mapping[str, Path]) -> Path:
    """A folder in the hub's layout with the parts of a model's file, kept in sdrt's home.

    others: folders of the parts that are given next to the file, which it may lack
    Raises CheckpointError.
    """
    external = {part: PartLocation(part, "", "") for part in others}
    check_whole(file.family, {**file.parts, **external}, file.header.records)
    parts = [part for part in file.family.prefixes if part not in others]
    mark = f"{file.mark}:{parts}:{sorted(map(str, others.values()))}"
    return build_once(_place(mark), partial(_convert_model, file, parts, others))


def folder_from_part(path: Path, part: str, known: Mapping[str, Any]) -> Path:
    """A folder with one part of a file and its configuration, kept in sdrt's home.

    Args:
        path: of a file that holds the part, alone or in a model.
        part: such as vae.
        known: configuration of the part that it stands for, for what no shape tells; for a UNet
            with the `projection_dim` of the second text encoder.

    Raises:
        CheckpointError: the file does not hold the part, or is not fully understood.
    """
    file = open_file(path)
    location = find_part_in(file.header.records, part)
    if location is None:
        what = seems_to_be(file.header.records) or (
            f"it holds {', '.join(file.parts) or 'nothing that is known'}"
        )
        raise CheckpointError(
            f"{path} holds no {part}: {what}; expected for {OPTIONS[part]} a file with a {part} "
            "in the original layout, in that of diffusers or of transformers"
        )
    mark = f"{file.mark}:{part}:{json.dumps(known, sort_keys=True, default=str)}"
    return build_once(_place(mark), partial(_convert_part, file, location, known))


def _place(mark: str) -> Path:
    return home() / "converted" / hashlib.sha256(mark.encode()).hexdigest()[:16]


def _convert_model(
    file: SingleFile, parts: Collection[str], others: Mapping[str, Path], folder: Path
) -> None:
    places = [file.parts[part] for part in parts]
    weights, passed = _read(file, places, full=True)
    second = others.get("text_encoder_2")
    pooled = read_json(second / "config.json").get("projection_dim", 512) if second else None
    configs = configs_of(file.family, {p: _tensors(w) for p, w in weights.items()}, pooled)
    _check_scale(file)
    prediction = file.settled_prediction()
    if file.sizes_follow and "unet" in configs:
        configs["unet"]["sample_size"] = prediction.sample_size
    texts = [others[part].parent for part in others if part.startswith("text_encoder")]
    folders = [place / "tokenizer" for place in (file.path.parent, *texts)]
    tokenizers = next((entry for entry in folders if entry.is_dir()), folders[0])
    copy_tokenizers(file.family, tokenizers, folder)
    (folder / "scheduler").mkdir(parents=True)
    scheduler = json.dumps(file.family.scheduler)
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)
    if file.family.index:
        (folder / "model_index.json").write_text(json.dumps(dict(file.family.index)))
    for place in places:
        (folder / place.part).mkdir()
        config = configs[place.part]
        _write(file, place, config, weights.pop(place.part), folder / place.part)
    _write_notes(folder, passed, prediction, file.sizes_follow)


def _check_scale(file: SingleFile) -> None:
    """Raise CheckpointError if the file scales its latents unlike its family."""
    if "scale_factor" not in file.header.records:
        return
    with open_safetensors(file.path) as opened:
        scale = opened.get_tensor("scale_factor").float().flatten().tolist()
    usual = file.family.vae["scaling_factor"]
    if len(scale) != 1 or abs(scale[0] - usual) > SCALE_TOLERANCE:
        raise CheckpointError(
            f"{file.path}: its scale_factor is {scale[:3]}; expected {usual}, the scale of the "
            f"latents of {file.family.name}"
        )


def _convert_part(
    file: SingleFile, place: PartLocation, known: Mapping[str, Any], folder: Path
) -> None:
    weights, passed = _read(file, [place], full=False)
    tensors = _tensors(weights[place.part])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    family = family_of(shapes, {place.part: replace(place, prefix="")})
    pooled = known.get("projection_dim") if place.part == "unet" else None
    own_config = configs_of(family, {place.part: tensors}, pooled)[place.part]
    channels, usual = (
        own_config.get("latent_channels"),
        known.get("latent_channels", LATENT_CHANNELS),
    )
    if place.part == "vae" and channels != usual:
        raise CheckpointError(
            f"{file.path}: its latents have {channels} channels, those of the model {usual}; it is "
            "of another family: give --vae an autoencoder that was made for this model"
        )
    if place.part == "vae":
        _check_family(file, known)
    config = {**own_config, **_inherited(place.part, known, own_config)}
    if "addition_time_embed_dim" in known and "addition_time_embed_dim" in own_config:
        config["addition_time_embed_dim"] = known["addition_time_embed_dim"]
    if place.part == "unet" and file.prediction and file.sizes_follow:
        config["sample_size"] = file.prediction.sample_size
    _write(file, place, config, weights[place.part], folder)
    _write_notes(folder, passed, file.prediction if place.part == "unet" else None, False)


def _check_family(file: SingleFile, known: Mapping[str, Any]) -> None:
    """Raise CheckpointError for the autoencoder of a whole model whose latents have another scale.

    An autoencoder alone does not say whose it is: those of 1.x, 2.x and XL have the same shapes.
    """
    scales = {family.vae["scaling_factor"] for family in FAMILIES}
    own, expected = file.family.vae["scaling_factor"], known.get("scaling_factor")
    if "unet" in file.parts and expected in scales - {own}:
        raise CheckpointError(
            f"{file.path} is a model of {file.family.name}, whose latents are scaled by {own}, "
            f"those of the model by {expected}: give --vae an autoencoder of the same family"
        )


def _inherited(
    part: str, known: Mapping[str, Any], own_config: Mapping[str, Any]
) -> dict[str, Any]:
    """What a part has in common with the one that it stands for, where its shapes do not tell."""
    if own_config.get("_class_name") == "AutoencoderTiny":
        return {}
    inherited = {key: known[key] for key in INHERITED[part.split("_")[0]] if key in known}
    if known.get("hidden_size") != own_config.get("hidden_size"):
        inherited.pop("num_attention_heads", None)
    heads = inherited.get("attention_head_dim")
    if isinstance(heads, list | tuple) and len(heads) != len(own_config["block_out_channels"]):
        del inherited["attention_head_dim"]
    return inherited


Named = dict[str, tuple[str, Tensor]]  # published name -> its name in the file, and the tensor


def _tensors(weights: Named) -> dict[str, Tensor]:
    return {name: tensor for name, (_, tensor) in weights.items()}


def _read(
    file: SingleFile, places: Iterable[PartLocation], full: bool
) -> tuple[dict[str, Named], list[str]]:
    """Every part's weights, and the names that were passed over.

    whole: whether all else in the file has to be understood, too
    """
    read: dict[str, Named] = {}
    passed: list[str] = []
    left = set(file.header.records)
    for place in places:
        own = {key for key in left if key.startswith(place.prefix)}
        left -= own
        read[place.part], ignored = _read_part(file, place, own)
        passed += ignored
    if full:
        replaced = tuple(f.prefix for p, f in file.parts.items() if p not in read and f.prefix)
        left = {key for key in left if not key.startswith(replaced)}
        passed += [key for key in left if shapes_nothing(key)]
        refuse_unknown(left.difference(passed) - {"scaled_fp8"}, str(file.path))
    return read, sorted(passed)


def _read_part(file: SingleFile, place: PartLocation, keys: set[str]) -> tuple[Named, list[str]]:
    names = {key: key.removeprefix(place.prefix) for key in keys}
    unread = _last_layer_unread(file, place, names)
    ignored = {k for k, name in names.items() if shapes_nothing_of(place.part, name, unread)}
    with open_safetensors(file.path) as opened:
        stored = {key: opened.get_tensor(key) for key in sorted(keys - ignored)}
    plain = weights_without_scales(stored)
    check_used(plain.items(), str(file.path))
    tensors_read: Named = {}
    unknown = []
    for key in list(plain):
        renamed = published_weights(place, names[key], plain.pop(key))
        tensors_read |= {name: (key, tensor) for name, tensor in renamed.items()}
        unknown += [] if renamed else [key]
    refuse_unknown(unknown, str(file.path))
    return tensors_read, sorted(ignored)


def _last_layer_unread(file: SingleFile, place: PartLocation, names: Mapping[str, str]) -> bool:
    if place.part != "text_encoder":
        return False
    ending = "token_embedding.weight"
    table = next((key for key, name in names.items() if name.endswith(ending)), "")
    record = file.header.records.get(table)
    wide = record is not None and record.shape[-1] == WIDTH_OF_OPEN_CLIP_H
    return place.layout == "open_clip" or wide


def _write(
    file: SingleFile, place: PartLocation, config: Mapping[str, Any], weights: Named, folder: Path
) -> None:
    """A part's folder; raises CheckpointError for weights that its network does not take."""
    taken = _names_taken(place.part, config, weights)
    refuse_unknown({weights[name][0] for name in set(weights) - taken}, str(file.path))
    if missing := sorted(taken - set(weights)):
        raise CheckpointError(
            f"{file.path}: its {place.part} lacks {missing[0]}, by its published name (and "
            f"{len(missing) - 1} others); it is not whole, or of an unknown make"
        )
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem = "model" if place.part.startswith("text_encoder") else "diffusion_pytorch_model"
    save_file(
        {name: tensor.contiguous() for name, (_, tensor) in weights.items()},
        folder / f"{stem}.safetensors",
    )


def _names_taken(part: str, config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The names of the weights that a part's network has."""
    if part.startswith("text_encoder"):
        return {name for name in names if TEXT_WEIGHT.fullmatch(name)}
    from sdrt.export.tiny_vae import AutoencoderTiny, TinyVaeConfig
    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig
    from sdrt.export.vae import AutoencoderKL, VaeConfig

    with torch.device("meta"):
        if part == "unet":
            return set(Unet(UnetConfig.from_json(config)).state_dict())
        if config.get("_class_name") == "AutoencoderTiny":
            return set(AutoencoderTiny(TinyVaeConfig.from_json(config)).state_dict())
        return set(AutoencoderKL(VaeConfig.from_json(config)).state_dict())


def _write_notes(
    folder: Path, passed: list[str], prediction: Prediction | None, sizes_follow: bool
) -> None:
    notes = {
        "passed_over": described(passed),
        "prediction": asdict(prediction) if prediction else None,
        "sizes_follow": sizes_follow,
    }
    (folder / NOTES).write_text(json.dumps(notes, indent=2))


def read_notes(folder: Path) -> dict[str, Any]:
    """What a conversion noted of its file; nothing for other folders."""
    path = folder / NOTES
    return read_json(path) if path.is_file() else {}
