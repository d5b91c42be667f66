"""Embedding files: by path, or by name in the folder `embeddings` of sdrt's home.

A word in a prompt that equals the name of a file of that folder is that file's embedding, as in the
AUTOMATIC1111 web UI. Knows files; their layouts are parsed by `layouts.py`.
"""

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdrt.bundle.safetensors import Tensors
from sdrt.bundle.store import home
from sdrt.errors import CheckpointError, SdrtError, UsageError
from sdrt.json_validation import shorten
from sdrt.runtime.lora.tags import TAG
from sdrt.runtime.text.added_tokens import MAX_CONTENT

from .layouts import Vectors, parse_vectors
from .words import Embedding

log = logging.getLogger(__name__)
SUFFIX = ".safetensors"
PICKLES = (".pt", ".bin", ".ckpt", ".pth", ".pkl")
SAVED_BY_DIFFUSERS = "learned_embeds.safetensors"  # in a folder
CONVERT = (
    "convert it where you trust it: tensors = torch.load(FILE, weights_only=True); then "
    "safetensors.torch.save_file({WORD: VECTORS}, 'WORD.safetensors')"
)
Widths = Mapping[str, int]  # of a model's text encoders


@dataclass(frozen=True, slots=True)
class SkippedEmbedding:
    """A file of the folder that is not used, and why."""

    name: str
    reason: str


def embeddings_folder() -> Path:
    return (home() / "embeddings").absolute()


def parse_embedding(text: str) -> tuple[str, list[str] | None]:
    """`"FILE"`, `"FILE:WORD"` or, of a word for each vector, `"FILE:WORD,WORD"` -> the file, or its
    name in the folder, and the words; None for those that the file says itself.
    """
    suffixes = "|".join(map(re.escape, (SUFFIX, *PICKLES)))
    match = re.fullmatch(rf"(?is)(.*?(?:{suffixes})|[^:]+)(?::(.+))?", text)
    if match is None:
        raise UsageError(f"the embedding {text!r}; expected FILE or FILE:WORD")
    return match[1], match[2].split(",") if match[2] else None


def find_embedding(name: str | os.PathLike[str]) -> Path:
    """A file's path, that of a folder that diffusers wrote, or that of the file of this name in the
    folder `embeddings`; raises CheckpointError if there is none.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{path} is a pickle, which is refused", hint=CONVERT)
    known = embeddings_folder()
    for candidate in (path, path / SAVED_BY_DIFFUSERS, known / f"{name}{SUFFIX}", known / path):
        if candidate.is_file():
            return candidate
    pickled = [path / "learned_embeds.bin", *(known / f"{name}{suffix}" for suffix in PICKLES)]
    if pickles := [candidate for candidate in pickled if candidate.is_file()]:
        raise CheckpointError(f"{pickles[0]} is a pickle, which is refused", hint=CONVERT)
    raise CheckpointError(
        f"there is no embedding file {path}, nor one of that name in {known}",
        hint="pass a .safetensors file; models on the Hub are not fetched",
    )


def read_embedding(path: Path, words: Sequence[str | None], widths: Widths) -> list[Embedding]:
    """The embeddings of a file.

    Args:
        path: Of the file.
        words: One for all its vectors, None for the word that the file or its name gives; or
            several, one for each vector.
        widths: Of the model's text encoders.

    Raises:
        CheckpointError: For a file that is damaged, of another layout or another width.
    """
    try:
        tensors = Tensors(path)
        vectors = parse_vectors(tensors)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return name_vectors(vectors, path.stem, words, widths, sha256)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error.message}", hint=error.hint) from error
    except (SdrtError, OSError) as error:
        raise CheckpointError(str(error)) from error


def embeddings_from_tensors(
    tensors: Mapping[str, np.ndarray], words: Sequence[str | None], widths: Widths
) -> list[Embedding]:
    """Embeddings of tensors in memory, as `read_embedding`."""
    vectors = parse_vectors(tensors)
    sha256 = hashlib.sha256(b"".join(a.tobytes() for a in vectors.by_encoder.values()))
    return name_vectors(vectors, "", words, widths, sha256.hexdigest())


def read_bundled(
    tensors: Mapping[str, Mapping[str, np.ndarray]], widths: Widths
) -> list[Embedding]:
    """The embeddings of a LoRA file, from the tensors of each word; raises CheckpointError as
    `read_embedding`.
    """
    embeddings = []
    for word, own in tensors.items():
        try:
            embeddings += embeddings_from_tensors(own, [word], widths)
        except CheckpointError as error:
            raise CheckpointError(f"embedding {shorten(word)}: {error.message}") from error
    return embeddings


def name_vectors(
    vectors: Vectors, stem: str, words: Sequence[str | None], widths: Widths, sha256: str
) -> list[Embedding]:
    """One embedding, or one for each of several words; raises CheckpointError."""
    by_encoder = _fit(vectors, widths)
    count = len(next(iter(by_encoder.values())))
    if len(words) > 1 and len(words) != count:
        raise CheckpointError(f"{count} vectors for {len(words)} words; expected one for each")
    if len(words) == 1:
        return [Embedding(_check_word(words[0] or vectors.name or stem), by_encoder, sha256)]
    return [
        Embedding(
            _check_word(word or ""), {part: a[i : i + 1] for part, a in by_encoder.items()}, sha256
        )
        for i, word in enumerate(words)
    ]


def list_folder(widths: Widths) -> tuple[list[Embedding], list[SkippedEmbedding]]:
    """The folder's embeddings, each called after its file, and the files that are not used."""
    embeddings, skipped = [], []
    for path in _files():
        try:
            if path.suffix.lower() in PICKLES:
                raise CheckpointError("a pickle, which is refused")
            embeddings += read_embedding(path, [path.stem], widths)
        except CheckpointError as error:
            skipped.append(SkippedEmbedding(path.stem, error.message))
    return embeddings, skipped


def list_embedding_files() -> dict[str, Path]:
    """The folder's files by the word that each is called."""
    return {path.stem: path for path in _files() if path.suffix.lower() == SUFFIX}


def _files() -> list[Path]:
    """All files of the folder that might be embeddings, sorted, none outside of it."""
    folder = embeddings_folder()
    inside = folder.resolve()
    files = [
        Path(parent, file)
        for parent, _, names in os.walk(folder)
        for file in names
        if Path(file).suffix.lower() in (SUFFIX, *PICKLES)
    ]
    return sorted(f for f in files if f.is_file() and f.resolve().is_relative_to(inside))


def _fit(vectors: Vectors, widths: Widths) -> dict[str, np.ndarray]:
    """The vectors by the model's text encoders."""
    by_encoder = dict(vectors.by_encoder)
    if "" in by_encoder and len(widths) == 1:
        by_encoder = {next(iter(widths)): by_encoder[""]}
    actual = {part: array.shape[1] for part, array in by_encoder.items()}
    if actual != dict(widths):
        raise CheckpointError(
            f"its vectors are {_describe(actual)}, expected {_describe(widths)}: it was made for "
            "another family of models"
        )
    return {part: by_encoder[part] for part in widths}


def _describe(widths: Widths) -> str:
    """`768 wide`, `768 and 1280 wide`."""
    return f"{' and '.join(map(str, widths.values()))} wide"


def _check_word(word: str) -> str:
    if not 1 <= len(word) <= MAX_CONTENT or word != word.strip() or not word.isprintable():
        raise CheckpointError(
            f"the word {shorten(word)}; expected 1 to {MAX_CONTENT} printable characters"
        )
    if TAG.fullmatch(word):
        raise CheckpointError(f"the word {word!r} reads as the tag of an extra network")
    return word
