"""Which of a folder's files hold a part's weights, and whether they are whole.

Knows the hub's names: one file, or shards with an index that says where each tensor is, in full
precision or as a `variant`. No pickle is ever read.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdrt import json_validation
from sdrt.bundle.safetensors import DOWNLOAD_AGAIN, read_header
from sdrt.errors import CheckpointError

STEMS = ("model", "diffusion_pytorch_model")
VARIANTS = ("", ".fp16")
PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle"}
TO_CONVERT = (
    'it may run code when read. Convert it where you trust it: python -c "import torch, '
    "safetensors.torch as s; w = torch.load('FILE', weights_only=True); "
    "s.save_file(w.get('state_dict', w), 'FILE.safetensors')\""
)
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def weight_names(names: Collection[str]) -> list[str]:
    """Of a folder's file names those that hold its weights, full precision preferred: one file, or
    an index and its shards. Raises CheckpointError where there are none, or only pickles.
    """
    for stem in STEMS:
        for variant in VARIANTS:
            full, index = f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"
            if full in names:
                return [full]
            if index in names:
                pattern = re.escape(stem) + r"{0}-\d+-of-\d+{1}\.safetensors"
                spellings = {pattern.format(variant, ""), pattern.format("", variant)}
                shards = [n for n in names if any(re.fullmatch(item, n) for item in spellings)]
                return [index, *sorted(shards)]
    pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"it has only {pickles[0]}, a pickle: {TO_CONVERT}")
    raise CheckpointError(
        "it has no weights; expected model.safetensors or diffusion_pytorch_model.safetensors, "
        "or their shards with an index"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part, each opened and held against the index where there is one.

    Raises CheckpointError: none, only pickles, damaged, shards missing, an index that lies.
    """
    try:
        first, *_ = weight_names({path.name for path in folder.iterdir()})
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if first.endswith(".json"):
        return _shards(folder / first)
    open_safetensors(folder / first)
    return [folder / first]


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; fetch it again")
    files = sorted({index.with_name(Path(file).name) for file in places.values()})
    if missing := [path.name for path in files if not path.is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}; "
            "fetch them again"
        )
    held = {path.name: set(open_safetensors(path).keys()) for path in files}
    said = [(name, Path(file).name) for name, file in places.items()]
    wrong = [f"{name} is not in {file}" for name, file in said if name not in held[file]]
    wrong += [f"{n} in {f} is not in it" for f in held for n in sorted(held[f] - set(places))]
    if wrong:
        raise CheckpointError(
            f"{index} does not tell the truth: {wrong[0]} (and {len(wrong) - 1} others); fetch "
            "index and shards again, of one revision"
        )
    return files


def open_safetensors(path: Path) -> Any:
    """The file, its header checked; raises CheckpointError if it is damaged."""
    read_header(path, CheckpointError)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {error}", hint=DOWNLOAD_AGAIN
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file; raises CheckpointError with the file's name."""
    return json_validation.read_json(path, CheckpointError)


def read_config(path: Path) -> dict[str, Any]:
    """The same of a configuration, whose values are bounded."""
    return json_validation.read_config(path, CheckpointError)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, as stored; raises CheckpointError if it is damaged."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
