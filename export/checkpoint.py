"""Where a model comes from: the embedded one, the hub, a folder, a single file.

Knows files and configuration; `modules.py` knows what to make of them. No pickle is ever read.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdrt.errors import CheckpointError

from .lora import Lora, changes_from_tensors, fused, parse_lora

KNOWN = {
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
EMBEDDED = ("shapes",)
PARTS = ("text_encoder", "unet", "vae")
WEIGHTS = ("model", "diffusion_pytorch_model")
PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle"}
TO_CONVERT = (
    'it may run code when read. Convert it where you trust it: python -c "import torch, '
    "safetensors.torch as s; w = torch.load('FILE', weights_only=True); "
    "s.save_file(w.get('state_dict', w), 'FILE.safetensors')\""
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder in the hub's layout and what to call it."""

    name: str
    source: str
    folder: Path
    others: Mapping[str, Path] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()

    def with_parts(self, parts: Mapping[str, str | None]) -> "Checkpoint":
        """The same with parts from elsewhere: a folder, or a hub id. Raises CheckpointError."""
        found = {part: find_part(part, where) for part, where in parts.items() if where}
        said = "".join(f", {part} {parts[part]}" for part in found)
        made = replace(self, source=self.source + said, others={**self.others, **found})
        for part in found:
            for path in made.weight_files(part):
                open_safetensors(path)
        return made

    def with_loras(self, named: Sequence[str]) -> "Checkpoint":
        """The same with LoRA files added, each `FILE` or `FILE:WEIGHT`; raises CheckpointError."""
        read = [read_lora(text) for text in named]
        said = "".join(f", lora {lora.name}:{lora.weight:g}" for lora in read)
        return replace(self, source=self.source + said, loras=(*self.loras, *read))

    def part_folder(self, part: str) -> Path:
        return self.others.get(part, self.folder / part)

    def config(self, part: str) -> dict[str, Any]:
        return _json(self.part_folder(part) / "config.json")

    def scheduler_config(self) -> dict[str, Any]:
        return _json(self.folder / "scheduler" / "scheduler_config.json")

    def weight_files(self, part: str) -> list[Path]:
        """The part's safetensors files, full precision preferred; raises CheckpointError."""
        for stem in WEIGHTS:
            for suffix in (".safetensors", ".fp16.safetensors"):
                path = self.part_folder(part) / f"{stem}{suffix}"
                if path.is_file():
                    return [path]
                index = path.with_name(path.name + ".index.json")
                if index.is_file():
                    shards = sorted(set(_json(index)["weight_map"].values()))
                    return [path.with_name(Path(shard).name) for shard in shards]
        folder = self.part_folder(part)
        pickles = [p.name for p in folder.glob("*") if p.suffix in PICKLES]
        if pickles:
            raise CheckpointError(f"{folder} has only {pickles[0]}, a pickle: {TO_CONVERT}")
        raise CheckpointError(
            f"{folder} has no weights; expected model.safetensors or "
            "diffusion_pytorch_model.safetensors"
        )

    def bytes_per_parameter(self) -> int:
        """2 or 4: how the UNet's weights are stored."""
        with safe_open(self.weight_files("unet")[0], framework="pt") as file:
            name = next(iter(file.keys()))
            return 2 if file.get_slice(name).get_dtype() in ("F16", "BF16") else 4

    def weights(self, part: str) -> dict[str, Tensor]:
        """All tensors of a part, on the CPU, as stored."""
        merged: dict[str, Tensor] = {}
        for path in self.weight_files(part):
            merged |= read_safetensors(path)
        return fused(part, merged, self.loras)


def find_checkpoint(model: str) -> Checkpoint:
    """The checkpoint behind a well-known name, hub id, folder or file.

    Raises CheckpointError: unknown name (with near matches), no network, a missing component, a
    pickle, an unreadable file.
    """
    path = Path(model).expanduser()
    if model in EMBEDDED:
        return _checked(Checkpoint(model, model, embedded_checkpoint(model)))
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{model} is a pickle, which is refused: {TO_CONVERT}")
    if path.is_dir():
        return _checked(Checkpoint(path.resolve().name, model, path))
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise CheckpointError(f"there is no file {model}")
        from .original_layout import checkpoint_from_file

        return _checked(Checkpoint(path.stem, model, checkpoint_from_file(path)))
    if model in KNOWN:
        return _checked(Checkpoint(model, KNOWN[model], download(KNOWN[model])))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return _checked(Checkpoint(model.split("/")[1], model, download(model)))
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
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", where) or where.startswith("."):
            raise CheckpointError(
                f"no {part} at {where!r}; give a folder with config.json and weights, or a hub id"
            )
        patterns = ["config.json", "*.safetensors", f"{part}/config.json", f"{part}/*.safetensors"]
        path = _fetched(where, patterns)
    for folder in (path / part, path):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{path} holds no {part}: neither config.json nor {part}/config.json")


def read_lora(text: str) -> Lora:
    """A LoRA file and its weight; raises CheckpointError if it is a pickle, damaged or unknown."""
    path, weight = parse_lora(text)
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{path} is a pickle, which is refused: {TO_CONVERT}")
    if not path.is_file():
        raise CheckpointError(f"there is no LoRA file {path}")
    return Lora(path.name, changes_from_tensors(read_safetensors(path)), weight)


def embedded_checkpoint(name: str) -> Path:
    import sdrt

    return Path(sdrt.__file__).parent / "models" / name


def download(repository: str) -> Path:
    """The files that a build needs, from the hub or its local cache."""
    patterns = ["scheduler/*.json", "tokenizer/*", "*/config.json"]
    return _fetched(repository, patterns + [f"{part}/*.safetensors" for part in PARTS])


def _fetched(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    ignored = ["*.non_ema.safetensors", "*.fp16.safetensors", "safety_checker/*"]
    try:
        folder = snapshot_download(repository, allow_patterns=patterns, ignore_patterns=ignored)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        first = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"cannot fetch {repository} from the hub{offline}: {first}. Without a network, copy "
            "the model's folder here, type sdrt build --model FOLDER, and set HF_HUB_OFFLINE=1 to "
            "use only what the hub's cache holds"
        ) from error
    return Path(folder)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    needed = ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    needed += [f"{part}/config.json" for part in PARTS]
    for name in needed:
        if not (checkpoint.folder / name).is_file():
            raise CheckpointError(
                f"{checkpoint.folder} is not a Stable Diffusion checkpoint: {name} is missing; "
                f"expected folders scheduler, tokenizer, {', '.join(PARTS)}"
            )
    for part in PARTS:
        for path in checkpoint.weight_files(part):
            open_safetensors(path)
    return checkpoint


def open_safetensors(path: Path) -> Any:
    """The file, its header checked; raises CheckpointError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}; fetch it again"
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file; raises CheckpointError if it is damaged or holds a NaN."""
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: the weight {name} holds NaN or infinity")
    return tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value
