"""Where a model comes from: the embedded one, the hub, a folder, a single file.

Knows files and configuration; `modules.py` knows what to make of them. No pickle is ever read.
"""

import difflib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdrt.bundle.embedded import MODELS
from sdrt.bundle.safetensors import read_header
from sdrt.errors import CheckpointError
from sdrt.runtime.lora.adapters import Lora, check_parts, compute_deltas, parse_lora, read_lora

from .hub import HUB_ID, PARTS, fetched
from .prediction import (
    Prediction,
    chosen_prediction,
    prediction_of_scheduler,
    scheduler_of_pipeline,
    scheduler_with,
)
from .single_file.config import FAMILIES
from .single_file.convert import (
    SingleFile,
    folder_from_file,
    folder_from_part,
    open_file,
    read_notes,
)
from .single_file.parts import OPTIONS
from .single_file.quantized import weights_without_scales
from .tokenizer import CheckpointTokenizer, missing_files, read_tokenizer
from .weights import (
    PICKLES,
    STEMS,
    TO_CONVERT,
    TOKENIZERS,
    read_config,
    read_json,
    read_safetensors,
    weight_files,
)

log = logging.getLogger("sdrt.build")
KNOWN = {
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-diffusion-xl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    "stable-diffusion-xl-refiner-1.0": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "ssd-1b": "segmind/SSD-1B",
}
EMBEDDED = ("shapes",)
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder in the hub's layout and what to call it."""

    name: str
    source: str
    folder: Path
    others: Mapping[str, Path] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    safety_checker: bool = False
    chosen: Prediction | None = None

    def with_safety_checker(self) -> "Checkpoint":
        """The same with its safety checker as a part; raises CheckpointError if it has none."""
        if not self.has_safety_checker:
            raise CheckpointError(f"{self.folder} has no safety_checker; build without it")
        result = replace(self, safety_checker=True)
        result.weight_files("safety_checker")
        return result

    @property
    def has_safety_checker(self) -> bool:
        return (self.part_folder("safety_checker") / "config.json").is_file()

    def with_parts(self, parts: Mapping[str, str | None]) -> "Checkpoint":
        """The same with parts from elsewhere, each a folder, a file or a hub id.

        Raises CheckpointError.
        """
        located = {
            part: find_part(part, where, self._known_of(part))
            for part, where in parts.items()
            if where
        }
        said = "".join(f", {part} {parts[part]}" for part in located)
        result = replace(self, source=self.source + said, others={**self.others, **located})
        for part in located:
            result.weight_files(part)
        return result

    def with_loras(self, named: Sequence[str]) -> "Checkpoint":
        """The same with LoRA files added, each `NAME` or `NAME:WEIGHT`; raises CheckpointError."""
        read = [read_lora(*parse_lora(text)) for text in named]
        check_parts(read, self.parts)
        if any(lora.embeddings for lora in read):
            log.warning(
                "a LoRA file's own embeddings are not merged: their words are text in prompts; "
                "pass the files when the bundle runs (--lora) to use them"
            )
        said = "".join(f", lora {lora.name}:{lora.weight}" for lora in read)
        return replace(self, source=self.source + said, loras=(*self.loras, *read))

    @property
    def unconditional(self) -> bool:
        """Whether it is an unconditional pixel model: a UNet is all there is."""
        path = self.part_folder("unet") / "config.json"
        return path.is_file() and read_json(path).get("_class_name") == "UNet2DModel"

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """One, two in models such as XL, of which a refiner has the second; none in unconditional
        ones.
        """
        if self.unconditional:
            return ()
        first, second = TOKENIZERS
        if not self.part_folder(second).is_dir():
            return (first,)
        return (first, second) if self.part_folder(first).is_dir() else (second,)

    @property
    def parts(self) -> tuple[str, ...]:
        after = ("safety_checker",) if self.safety_checker else ()
        return (
            ("unet", *after) if self.unconditional else (*self.text_encoders, "unet", "vae", *after)
        )

    def part_folder(self, part: str) -> Path:
        return self.others.get(part, self.folder / part)

    def config(self, part: str) -> dict[str, Any]:
        config = read_config(self.part_folder(part) / "config.json")
        if part == "unet" and self.chosen and read_notes(self.folder).get("sizes_follow"):
            config["sample_size"] = self.chosen.sample_size
        return config

    def _known_of(self, part: str) -> dict[str, Any]:
        """The configuration of a part that another stands for; without one, its family's. For a
        UNet also the `projection_dim` of the second text encoder.
        """
        known = self._config_if_any(part)
        if part == "unet" and (second := self._config_if_any("text_encoder_2")):
            return {"projection_dim": second.get("projection_dim", 512), **known}
        if part != "vae" or (known and known.get("_class_name") != "AutoencoderTiny"):
            return known
        is_xl = self._config_if_any("unet").get("addition_embed_type") is not None
        return dict(FAMILIES[2 if is_xl else 0].vae)

    def _config_if_any(self, part: str) -> dict[str, Any]:
        path = self.part_folder(part) / "config.json"
        return read_config(path) if path.is_file() else {}

    def with_prediction(self, kind: str | None, zero_snr: bool) -> "Checkpoint":
        """The same with what its model predicts as chosen by hand; raises UsageError."""
        if kind is None and not zero_snr:
            return self
        return replace(self, chosen=chosen_prediction(self.prediction, kind, zero_snr))

    @property
    def prediction(self) -> Prediction:
        """What the UNet predicts: as chosen, as its file says, or as the scheduler's file says."""
        return self._own_prediction() or prediction_of_scheduler(self._stored_scheduler_config())

    def _own_prediction(self) -> Prediction | None:
        if self.chosen:
            return self.chosen
        unet = self.part_folder("unet")
        noted = [read_notes(folder).get("prediction") for folder in (unet, self.folder)]
        if "unet" in self.others and not noted[0]:
            local = unet.parent / "scheduler" / "scheduler_config.json"
            if unet.name == "unet" and local.is_file():  # that of the model which the UNet is from
                return prediction_of_scheduler(read_config(local))
        return next((Prediction(**entry) for entry in noted if entry), None)

    def passed_over(self) -> list[str]:
        """The names in single files that shape nothing, a line for each file."""
        folders = (self.folder, *self.others.values())
        return [line for f in folders if (line := read_notes(f).get("passed_over"))]

    def scheduler_config(self) -> dict[str, Any]:
        stored, prediction = self._stored_scheduler_config(), self._own_prediction()
        return scheduler_with(stored, prediction) if prediction else stored

    def _stored_scheduler_config(self) -> dict[str, Any]:
        path = self.folder / "scheduler" / "scheduler_config.json"
        local = self.part_folder("unet") / path.name  # where there is one part, at the root
        if local.is_file():
            return read_config(local)
        stored = read_config(path)
        return scheduler_of_pipeline(stored) if self._corrects_scheduler else stored

    @property
    def _index(self) -> dict[str, Any]:
        """What diffusers' pipeline says of the model; nothing where there is no such file."""
        path = self.folder / "model_index.json"
        return read_json(path) if path.is_file() else {}

    @property
    def _corrects_scheduler(self) -> bool:
        """Whether diffusers' pipeline corrects its scheduler: that of 1.x and 2.x does, those of XL
        and of latent consistency models do not.
        """
        kind = str(self._index.get("_class_name"))
        return self.text_encoders == ("text_encoder",) and not kind.startswith("LatentConsistency")

    def tokenizers(self) -> dict[str, CheckpointTokenizer]:
        """Every text encoder's tokenizer; raises CheckpointError."""
        index, tokenizers = self._index, {}
        for part in self.text_encoders:
            match index.get(TOKENIZERS[part]):
                case [_, str(kind)]:
                    named: str | None = kind
                case _:
                    named = None
            tokenizers[part] = read_tokenizer(self.folder / TOKENIZERS[part], named)
        return tokenizers

    def zeroes_empty_prompt(self) -> bool:
        """Whether an empty negative prompt is zeros: in models such as XL, unless the model turns
        that off."""
        flag = self._index.get("force_zeros_for_empty_prompt", True)
        return "text_encoder_2" in self.text_encoders and bool(flag)

    @property
    def requires_aesthetics_score(self) -> bool | None:
        """Whether the UNet reads an aesthetic score; None where no file says."""
        flag = self._index.get("requires_aesthetics_score")
        return None if flag is None else bool(flag)

    def weight_files(self, part: str) -> list[Path]:
        """The part's safetensors files, full precision preferred; raises CheckpointError."""
        return weight_files(self.part_folder(part))

    def parameters(self) -> int:
        """How many numbers its weight files hold."""
        files = [file for part in self.parts for file in self.weight_files(part)]
        headers = [read_header(file, CheckpointError) for file in files]
        return sum(math.prod(r.shape) for header in headers for r in header.records.values())

    def weights(self, part: str) -> dict[str, Tensor]:
        """All tensors of a part, on the CPU, as stored."""
        merged: dict[str, Tensor] = {}
        for path in self.weight_files(part):
            merged |= read_safetensors(path)
        merged = weights_without_scales(merged)
        shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
        for name, delta in compute_deltas(
            part, shapes, self.loras, lambda name: merged[name].float().numpy()
        ):
            merged[name] = merged[name].float() + torch.from_numpy(delta)
        return merged


def find_checkpoint(
    model: str,
    revision: str | None = None,
    safety_checker: bool = False,
    parts: Mapping[str, str | None] | None = None,
) -> Checkpoint:
    """The checkpoint behind a well-known name, hub id, folder or file.

    Args:
        model: what `sdrt build --model` takes.
        revision: a branch, tag or commit of a model on the hub.
        safety_checker: whether it is a part.
        parts: by name the folder, file or hub id of parts from elsewhere, which the model may lack.

    Raises:
        CheckpointError: unknown name (with near matches), no network, a missing component, a
            pickle, an unreadable file.
    """
    replacements = {part: where for part, where in (parts or {}).items() if where}
    required_parts = (*PARTS, "safety_checker") if safety_checker else PARTS
    checkpoint = _checked(_actual(model, revision, required_parts, replacements))
    return checkpoint.with_safety_checker() if safety_checker else checkpoint


def _actual(
    model: str, revision: str | None, parts: Sequence[str], replacements: Mapping[str, str]
) -> Checkpoint:
    path = Path(model).expanduser()
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{model} is a pickle, which is refused: {TO_CONVERT}")
    single = path.suffix.lower() == SUFFIX and not path.is_dir()
    repository, here = KNOWN.get(model, model), path.exists() or single
    if not here and model not in EMBEDDED and re.fullmatch(HUB_ID, repository):
        source = f"{repository}@{revision}" if revision else repository
        folder = fetched(repository, parts, revision)
        return Checkpoint(model.split("/")[-1], source, folder).with_parts(replacements)
    if revision:
        raise CheckpointError(f"revision {revision!r} of {model}: only models on the hub have any")
    if model in EMBEDDED:
        return Checkpoint(model, model, embedded_checkpoint(model)).with_parts(replacements)
    if path.is_dir():
        return Checkpoint(path.resolve().name, model, path).with_parts(replacements)
    if single:
        return _from_file(open_file(path), replacements)
    near = difflib.get_close_matches(model, [*EMBEDDED, *KNOWN], n=3, cutoff=0.4)
    known = (
        f"known names are {', '.join([*EMBEDDED, *KNOWN])}; or give a hub id (org/name), a folder, "
    )
    raise CheckpointError(
        f"{model} is not a {SUFFIX} file" if path.is_file() else f"no model called {model!r}",
        hint=f"did you mean {' or '.join(near)}?" if near else f"{known}or a {SUFFIX} file",
    )


def _from_file(file: SingleFile, replacements: Mapping[str, str]) -> Checkpoint:
    others: dict[str, Path] = {}
    for part in sorted(
        replacements, key=lambda entry: entry == "unet"
    ):  # it depends on the text encoders
        known = file.known_of(part)
        if part == "unet" and (second := others.get("text_encoder_2")):
            known["projection_dim"] = read_config(second / "config.json").get("projection_dim", 512)
        others[part] = find_part(part, replacements[part], known)
    said = "".join(f", {part} {where}" for part, where in replacements.items())
    folder = folder_from_file(file, others)
    return Checkpoint(file.path.stem, f"{file.path}{said}", folder, others)


def find_part(part: str, where: str, known: Mapping[str, Any] | None = None) -> Path:
    """The folder of one part: itself, that of a whole model, of a file, or of a hub repository.

    known: configuration of the part that it stands for, for what no shape in a file tells
    """
    path = Path(where).expanduser()
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{where} is a pickle, which is refused: {TO_CONVERT}")
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return _part_of_file(part, path, known or {})
    if not path.is_dir():
        if not re.fullmatch(HUB_ID, where):
            raise CheckpointError(
                f"no {part} at {where!r}; give a .safetensors file, a folder with config.json and "
                f"weights, or a hub id to {OPTIONS.get(part, part)}"
            )
        path = fetched(where, parts=(part,))
    for folder in (path / part, path):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{path} holds no {part}: neither config.json nor {part}/config.json")


def _part_of_file(part: str, path: Path, known: Mapping[str, Any]) -> Path:
    """A file's part; one of a folder in the hub's layout has its configuration next to it."""
    config = path.parent / "config.json"
    if path.is_file() and path.name.split(".")[0] in STEMS and config.is_file():
        if weight_files(path.parent) == [path]:
            return path.parent
        known = {**known, **read_config(config)}
    return folder_from_part(path, part, known)


def embedded_checkpoint(name: str) -> Path:
    """The folder of a checkpoint that ships with the package."""
    return MODELS / name


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    at_the_root = replace(checkpoint, others={"unet": checkpoint.folder})
    if not checkpoint.part_folder("unet").is_dir() and at_the_root.unconditional:
        checkpoint = at_the_root
    if checkpoint.unconditional:
        checkpoint.scheduler_config()
        checkpoint.weight_files("unet")
        return checkpoint
    needed = ["scheduler/scheduler_config.json"]
    for name in (TOKENIZERS[part] for part in checkpoint.text_encoders):
        needed += [f"{name}/{file}" for file in missing_files(checkpoint.folder / name)]
    needed += [f"{p}/config.json" for p in checkpoint.parts if p not in checkpoint.others]
    for name in needed:
        if not (checkpoint.folder / name).is_file():
            raise CheckpointError(
                f"{checkpoint.folder} is not a Stable Diffusion checkpoint: {name} is missing; "
                f"expected folders scheduler, tokenizer, {', '.join(checkpoint.parts)}"
            )
    for part in checkpoint.parts:
        checkpoint.weight_files(part)
    return checkpoint
