"""The layouts of embedding files: which vectors a file has, for which text encoder and which word.

- diffusers and most others: one tensor, `{word: [n, width]}`. kohya's scripts call it `emb_params`,
  the AUTOMATIC1111 web UI `string_to_param.*`: the word is then the file's name.
- SDXL: `clip_l` and `clip_g`; diffusers' training scripts call them `text_encoders_0` and `_1`.
- Bundled in a LoRA file: `bundle_emb.WORD.` before any of these.

Knows names and shapes of tensors; not tokenizers, nor where files are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from sdrt.errors import CheckpointError
from sdrt.json_validation import shorten

BUNDLED = "bundle_emb."
ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
NAMELESS = ("emb_params", "string_to_param", "*")  # tensors that are not called after their word
MAX_VECTORS = 512


@dataclass(frozen=True, slots=True)
class Vectors:
    """What a file stores of one word.

    Attributes:
        name: The tensor's, where that is a word; else "".
        by_encoder: [n, width] float32 by text encoder; the key "" is any encoder's.
    """

    name: str
    by_encoder: Mapping[str, np.ndarray]


def parse_vectors(tensors: Mapping[str, np.ndarray]) -> Vectors:
    """The vectors of a file, or of one word of a LoRA file.

    Raises:
        CheckpointError: For another layout, another number of axes, too many vectors, and for NaN
            and infinity.
    """
    parts = {part: key for key, part in ENCODERS.items() if key in tensors}
    if parts and len(parts) == len(tensors):
        vectors = {part: _check_vectors(key, tensors[key]) for part, key in parts.items()}
        if len({len(array) for array in vectors.values()}) > 1:
            counts = " and ".join(f"{key} {len(vectors[part])}" for part, key in parts.items())
            raise CheckpointError(f"the encoders have different numbers of vectors: {counts}")
        return Vectors("", vectors)
    if len(tensors) != 1:
        keys = ", ".join(map(shorten, list(tensors)[:4]))
        raise CheckpointError(
            f"{len(tensors)} tensors ({keys}); expected one, or clip_l and clip_g: it is not an "
            "embedding of Stable Diffusion"
        )
    ((key, tensor),) = tensors.items()
    name = "" if key.partition(".")[0] in NAMELESS else key
    return Vectors(name, {"": _check_vectors(key, tensor)})


def split_bundled(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The embeddings of a LoRA file: by word, their tensors by name; empty if it has none."""
    words: dict[str, dict[str, np.ndarray]] = {}
    for key in bundled_keys(tensors):
        word, _, name = key.removeprefix(BUNDLED).partition(".")
        words.setdefault(word, {})[name or key] = tensors[key]
    return words


def bundled_keys(keys: Iterable[str]) -> list[str]:
    """Those of a LoRA file's keys that are of embeddings."""
    return [key for key in keys if key.startswith(BUNDLED)]


def _check_vectors(key: str, tensor: np.ndarray) -> np.ndarray:
    """[width] or [n, width] -> [n, width] float32."""
    array = np.atleast_2d(tensor)
    if array.ndim != 2 or not 1 <= len(array) <= MAX_VECTORS or not array.shape[1]:
        raise CheckpointError(
            f"{shorten(key)} is {list(tensor.shape)}; expected [1 to {MAX_VECTORS}, width]"
        )
    if array.dtype.kind != "f":
        raise CheckpointError(f"{shorten(key)} is {array.dtype}; expected floating point")
    with np.errstate(over="ignore"):
        vectors = array.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise CheckpointError(f"{shorten(key)} holds NaN or infinity")
    return vectors
