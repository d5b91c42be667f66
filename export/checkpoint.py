"""Where a model comes from: the embedded one, the hub, a folder, a single file.

Knows files and configuration; `modules.py` knows what to make of them. No pickle is ever read.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdrt.errors import CheckpointError

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

    def config(self, part: str) -> dict[str, Any]:
        return _json(self.folder / part / "config.json")

    def scheduler_config(self) -> dict[str, Any]:
        return _json(self.folder / "scheduler" / "scheduler_config.json")

    def weight_files(self, part: str) -> list[Path]:
        """The part's safetensors files, full precision preferred; raises CheckpointError."""
        for stem in WEIGHTS:
            for suffix in (".safetensors", ".fp16.safetensors"):
                path = self.folder / part / f"{stem}{suffix}"
                if path.is_file():
                    return [path]
                index = path.with_name(path.name + ".index.json")
                if index.is_file():
                    shards = sorted(set(_json(index)["weight_map"].values()))
                    return [path.with_name(Path(shard).name) for shard in shards]
        pickles = [p.name for p in (self.folder / part).glob("*") if p.suffix in PICKLES]
        if pickles:
            raise CheckpointError(
                f"{self.folder / part} has only {pickles[0]}, a pickle: {TO_CONVERT}"
            )
        raise CheckpointError(
            f"{self.folder / part} has no weights; expected model.safetensors or "
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
        return merged


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


def embedded_checkpoint(name: str) -> Path:
    import sdrt

    return Path(sdrt.__file__).parent / "models" / name


def download(repository: str) -> Path:
    """The files that a build needs, from the hub or its local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["scheduler/*.json", "tokenizer/*", "*/config.json"]
    patterns += [f"{part}/*.safetensors" for part in PARTS]
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
