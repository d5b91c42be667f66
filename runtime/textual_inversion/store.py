"""The embeddings of a pipeline: what `load_textual_inversion` loaded, what LoRA files bundle, and
what is in the folder `embeddings`.

Knows files and sets; not how a prompt is encoded.
"""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdrt.errors import CheckpointError, UsageError
from sdrt.runtime.parsing import parse_array
from sdrt.runtime.text.added_tokens import normalize
from sdrt.runtime.text.tokenizer import Tokenizer

from .files import (
    SkippedEmbedding,
    Widths,
    embeddings_from_tensors,
    find_embedding,
    list_folder,
    parse_embedding,
    read_embedding,
)
from .words import Embedding, EmbeddingSet, check_count, check_words

log = logging.getLogger(__name__)
Source = str | os.PathLike[str] | Mapping[str, np.ndarray]
Words = str | Sequence[str] | None


class EmbeddingStore:
    """Shared by the pipelines over one bundle's engines. A change replaces the set; calls that run
    keep the set that they began with.

    Attributes:
        current: The words of calls that begin now.
        skipped: Files of the folder that are not used.
        widths: Of the text encoders.
    """

    def __init__(self, tokenizers: Mapping[str, Tokenizer], widths: Widths) -> None:
        self.current = EmbeddingSet(tokenizers)
        self.skipped: tuple[SkippedEmbedding, ...] = ()
        self.widths = widths
        self._lock = threading.Lock()

    def open(self, named: Sequence[str | os.PathLike[str]]) -> None:
        """Read the folder, and load files by `FILE`, `NAME` or `FILE:WORD`; raises as `load`."""
        self.read_folder()
        for item in named:
            source, words = parse_embedding(os.fspath(item))
            self.load(source, words)

    def load(self, source: Source | Sequence[Source], words: Words = None) -> None:
        """Load embeddings next to those that are loaded; all of them or none.

        Args:
            source: Files, names in the folder, folders of diffusers, or tensors by name.
            words: One for each source; of one source several, one for each of its vectors; None for
                what the files say.

        Raises:
            CheckpointError: For files and words that do not fit the model, or each other.
            UsageError: For another number of words than sources, and for a model without prompts.
        """
        if not self.widths:
            raise UsageError("this model reads no prompt, so it takes no embeddings")
        sources = [source] if isinstance(source, str | os.PathLike | Mapping) else [*source]
        added: list[Embedding] = []
        for item, names in zip(sources, _assign_words(sources, words), strict=True):
            added += self._read(item, names)
        with self._lock:
            current = self.current
            check_count(len(current.loaded) + len(current.bundled) + len(added))
            check_words(added, current.tokenizers, current.taken)
            self.current = replace(current, loaded=(*current.loaded, *added))
        for embedding in added:
            log.info("embedding %s: %d vectors", embedding.word, embedding.num_vectors)

    def unload(self, words: Words = None) -> None:
        """Forget loaded words, None for all; raises UsageError for one that is not loaded."""
        names = [words] if isinstance(words, str) else words
        with self._lock:
            loaded = {e.keys[0]: e for e in self.current.loaded}
            for name in loaded if names is None else names:
                if normalize(name) not in loaded:
                    have = ", ".join(e.word for e in self.current.loaded) or "none"
                    raise UsageError(f"the word {name!r} is not loaded; loaded are {have}")
            gone = set(loaded) if names is None else set(map(normalize, names))
            remaining = tuple(e for key, e in loaded.items() if key not in gone)
            self.current = replace(self.current, loaded=remaining)

    def check_bundled(self, embeddings: Sequence[Embedding]) -> None:
        """Raise CheckpointError for words of LoRA files that collide."""
        check_words((*self.current.loaded, *embeddings), self.current.tokenizers)

    def set_bundled(self, embeddings: Sequence[Embedding]) -> None:
        """Use the embeddings of these LoRA files and of no others."""
        with self._lock:
            if embeddings or self.current.bundled:
                self.current = replace(self.current, bundled=tuple(embeddings))

    def adopt(self, other: "EmbeddingStore") -> None:
        """Use the words of a pipeline that was replaced."""
        with self._lock:
            self.current, self.skipped = other.current, other.skipped

    def read_folder(self) -> None:
        """Read the folder `embeddings`; a file that does not fit is skipped, and logged."""
        if not self.widths:
            return
        embeddings, skipped = list_folder(self.widths)
        listed: list[Embedding] = []
        names: dict[str, str] = {}
        for embedding in embeddings:
            try:
                names |= check_words([embedding], self.current.tokenizers, names)
                listed.append(embedding)
            except CheckpointError as error:
                skipped.append(SkippedEmbedding(embedding.word, error.message))
        for file in skipped:
            log.debug("embedding %s is skipped: %s", file.name, file.reason)
        if listed:
            log.debug("embeddings: %s", ", ".join(embedding.word for embedding in listed))
        with self._lock:
            self.current = replace(self.current, listed=tuple(listed))
            self.skipped = tuple(skipped)

    def for_call(self, begun: EmbeddingSet) -> EmbeddingSet:
        """A call's set with the embeddings of the LoRA files that its image is generated with."""
        current = self.current
        if begun.bundled is current.bundled:
            return begun
        return replace(begun, bundled=current.bundled)

    def _read(self, source: Source, words: Sequence[str | None]) -> list[Embedding]:
        if isinstance(source, Mapping):
            arrays = {name: parse_array(f"embedding {name}", a) for name, a in source.items()}
            return embeddings_from_tensors(arrays, words, self.widths)
        return read_embedding(find_embedding(source), words, self.widths)


def _assign_words(sources: Sequence[Source], words: Words) -> list[list[str | None]]:
    """The words of each source."""
    if words is None:
        return [[None] for _ in sources]
    names = [words] if isinstance(words, str) else list(words)
    if len(sources) == 1 and names:
        return [[*names]]
    if len(names) != len(sources):
        raise UsageError(f"{len(names)} words for {len(sources)} embeddings; expected one for each")
    return [[name] for name in names]
