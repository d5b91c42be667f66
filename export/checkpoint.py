"""Where a model comes from: the embedded one, the hub, a folder, a single file.

Knows files and configuration; `modules.py` knows what to make of them. No pickle is ever read.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdrt.errors import CheckpointError
from sdrt.runtime.lora import Lora, check_parts, deltas, parse_lora, read_lora
from sdrt.tensors import read_header

from .hub import HUB_ID, PARTS, fetched
from .weight_files import (
    PICKLES,
    TO_CONVERT,
    open_safetensors,
    read_config,
    read_json,
    weight_files,
)

KNOWN = {
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-diffusion-xl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    "ssd-1b": "segmind/SSD-1B",
}
EMBEDDED = ("shapes",)
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKENIZER_FILES = ("vocab.json", "merges.txt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder in the hub's layout and what to call it."""

    name: str
    source: str
    folder: Path
    others: Mapping[str, Path] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    safety_checker: bool = False

    def with_safety_checker(self) -> "Checkpoint":
        """The same with its safety checker as a part; raises CheckpointError if it has none."""
        if not self.has_safety_checker:
            raise CheckpointError(f"{self.folder} has no safety_checker; build without it")
        made = replace(self, safety_checker=True)
        made.weight_files("safety_checker")
        return made

    @property
    def has_safety_checker(self) -> bool:
        return (self.part_folder("safety_checker") / "config.json").is_file()

    def with_parts(self, parts: Mapping[str, str | None]) -> "Checkpoint":
        """The same with parts from elsewhere: a folder, or a hub id. Raises CheckpointError."""
        found = {part: find_part(part, where) for part, where in parts.items() if where}
        said = "".join(f", {part} {parts[part]}" for part in found)
        made = replace(self, source=self.source + said, others={**self.others, **found})
        for part in found:
            made.weight_files(part)
        return made

    def with_loras(self, named: Sequence[str]) -> "Checkpoint":
        """The same with LoRA files added, each `NAME` or `NAME:WEIGHT`; raises CheckpointError."""
        read = [read_lora(*parse_lora(text)) for text in named]
        check_parts(read, self.parts)
        said = "".join(f", lora {lora.name}:{lora.weight:g}" for lora in read)
        return replace(self, source=self.source + said, loras=(*self.loras, *read))

    @property
    def unconditional(self) -> bool:
        """Whether it draws pixels and is told nothing: a UNet is all there is."""
        path = self.part_folder("unet") / "config.json"
        return path.is_file() and read_json(path).get("_class_name") == "UNet2DModel"

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """One, two in models such as XL, none in unconditional ones."""
        if self.unconditional:
            return ()
        return tuple(TOKENIZERS)[: 2 if self.part_folder("text_encoder_2").is_dir() else 1]

    @property
    def parts(self) -> tuple[str, ...]:
        after = ("safety_checker",) if self.safety_checker else ()
        return (
            ("unet", *after) if self.unconditional else (*self.text_encoders, "unet", "vae", *after)
        )

    def part_folder(self, part: str) -> Path:
        return self.others.get(part, self.folder / part)

    def config(self, part: str) -> dict[str, Any]:
        return read_config(self.part_folder(part) / "config.json")

    def scheduler_config(self) -> dict[str, Any]:
        path = self.folder / "scheduler" / "scheduler_config.json"
        beside = self.part_folder("unet") / path.name  # where there is one part, at the root
        return read_config(beside if beside.is_file() else path)

    def pad_token(self, tokenizer: str) -> str | None:
        """The token that pads prompts, if a tokenizer's files name one."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = self.folder / tokenizer / name
            said = read_json(path).get("pad_token") if path.is_file() else None
            said = said.get("content") if isinstance(said, dict) else said
            if isinstance(said, str):
                return said
        return None

    def zeroes_empty_prompt(self) -> bool:
        """Whether an empty negative prompt is zeros: with two text encoders, unless told not to."""
        path = self.folder / "model_index.json"
        told = read_json(path).get("force_zeros_for_empty_prompt", True) if path.is_file() else True
        return len(self.text_encoders) > 1 and bool(told)

    def weight_files(self, part: str) -> list[Path]:
        """The part's safetensors files, full precision preferred; raises CheckpointError."""
        return weight_files(self.part_folder(part))

    def bytes_per_parameter(self) -> int:
        """2 or 4: how the UNet's weights are stored."""
        records = read_header(self.weight_files("unet")[0], CheckpointError).records
        return 2 if {each.dtype for each in records.values()} & {"F16", "BF16"} else 4

    def weights(self, part: str) -> dict[str, Tensor]:
        """All tensors of a part, on the CPU, as stored."""
        merged: dict[str, Tensor] = {}
        for path in self.weight_files(part):
            merged |= read_safetensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
        for name, delta in deltas(
            part, shapes, self.loras, lambda name: merged[name].float().numpy()
        ):
            merged[name] = merged[name].float() + torch.from_numpy(delta)
        return merged


def find_checkpoint(
    model: str, revision: str | None = None, safety_checker: bool = False
) -> Checkpoint:
    """The checkpoint behind a well-known name, hub id, folder or file.

    revision: a branch, tag or commit of a model on the hub
    safety_checker: whether it is a part
    Raises CheckpointError: unknown name (with near matches), no network, a missing component, a
    pickle, an unreadable file.
    """
    if safety_checker:
        return _found(model, revision, (*PARTS, "safety_checker")).with_safety_checker()
    return _found(model, revision, PARTS)


def _found(model: str, revision: str | None, parts: Sequence[str]) -> Checkpoint:
    path = Path(model).expanduser()
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{model} is a pickle, which is refused: {TO_CONVERT}")
    repository, here = KNOWN.get(model, model), path.exists() or path.suffix == ".safetensors"
    if not here and model not in EMBEDDED and re.fullmatch(HUB_ID, repository):
        source = f"{repository}@{revision}" if revision else repository
        folder = fetched(repository, parts, revision)
        return _checked(Checkpoint(model.split("/")[-1], source, folder))
    if revision:
        raise CheckpointError(f"revision {revision!r} of {model}: only models on the hub have any")
    if model in EMBEDDED:
        return _checked(Checkpoint(model, model, embedded_checkpoint(model)))
    if path.is_dir():
        return _checked(Checkpoint(path.resolve().name, model, path))
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise CheckpointError(f"there is no file {model}")
        from .original_layout import checkpoint_from_file

        return _checked(Checkpoint(path.stem, model, checkpoint_from_file(path)))
    near = difflib.get_close_matches(model, [*EMBEDDED, *KNOWN], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise CheckpointError(
        f"no model called {model!r}: {hint}known names are {', '.join([*EMBEDDED, *KNOWN])}; "
        "or give a hub id (org/name), a folder, or a .safetensors file"
    )


def find_part(part: str, where: str) -> Path:
    """The folder of one part: itself, that of a whole model, or of a hub repository."""
    path = Path(where).expanduser()
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{where} is a pickle, which is refused: {TO_CONVERT}")
    if not path.is_dir():
        if not re.fullmatch(HUB_ID, where):
            raise CheckpointError(
                f"no {part} at {where!r}; give a folder with config.json and weights, or a hub id"
            )
        path = fetched(where, parts=(part,))
    for folder in (path / part, path):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{path} holds no {part}: neither config.json nor {part}/config.json")


def embedded_checkpoint(name: str) -> Path:
    import sdrt

    return Path(sdrt.__file__).parent / "models" / name


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    at_the_root = replace(checkpoint, others={"unet": checkpoint.folder})
    if not (checkpoint.folder / "unet").is_dir() and at_the_root.unconditional:
        checkpoint = at_the_root
    if checkpoint.unconditional:
        checkpoint.scheduler_config()
        checkpoint.weight_files("unet")
        return checkpoint
    needed = ["scheduler/scheduler_config.json"]
    for part in checkpoint.text_encoders:
        needed += [f"{TOKENIZERS[part]}/{name}" for name in TOKENIZER_FILES]
    needed += [f"{part}/config.json" for part in checkpoint.parts]
    for name in needed:
        if not (checkpoint.folder / name).is_file():
            raise CheckpointError(
                f"{checkpoint.folder} is not a Stable Diffusion checkpoint: {name} is missing; "
                f"expected folders scheduler, tokenizer, {', '.join(checkpoint.parts)}"
            )
    for part in checkpoint.parts:
        checkpoint.weight_files(part)
    return checkpoint


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file; raises CheckpointError if it is damaged or holds a NaN."""
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: the weight {name} holds NaN or infinity")
    return tensors
