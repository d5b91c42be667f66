"""The words that a call may use besides its model's vocabulary, and their embeddings.

Knows tokenizers and vectors; not files.
"""

import hashlib
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sdrt.errors import CheckpointError
from sdrt.runtime.text.added_tokens import AddedToken, normalize
from sdrt.runtime.text.tokenizer import FIRST_WORD_ID, Tokenizer

MAX_WORDS = 10_000


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors. What is derived of it is stored, as sets change and words stay.

    Attributes:
        word: As prompts have it, in any case.
        by_encoder: [n, width] float32 by text encoder; one n for all.
        sha256: Of the file, or of the vectors where there is none.
    """

    word: str
    by_encoder: Mapping[str, np.ndarray]
    sha256: str

    @property
    def num_vectors(self) -> int:
        """How many tokens the word is."""
        return len(next(iter(self.by_encoder.values())))

    @property
    def short_hash(self) -> str:
        """As the AUTOMATIC1111 web UI writes it into an image's text."""
        return self.sha256[:12]

    @cached_property
    def names(self) -> list[str]:
        """What prompts call it: the word, and each further vector alone, as in diffusers."""
        return [self.word, *(f"{self.word}_{i}" for i in range(1, self.num_vectors))]

    @cached_property
    def keys(self) -> list[str]:
        """Its names as they are compared, normalized."""
        return [*map(normalize, self.names)]

    @cached_property
    def tokens(self) -> list[AddedToken]:
        """One for each of its names."""
        return [*map(_token, self.names)]


@dataclass(frozen=True, slots=True)
class EncoderWords:
    """What one text encoder reads.

    Attributes:
        tokenizer: With the words.
        vectors: [all words' vectors, width] float32; the id `FIRST_WORD_ID` + i is row i.
        digest: Tells sets of vectors apart.
    """

    tokenizer: Tokenizer
    vectors: np.ndarray
    digest: bytes = b""


@dataclass(frozen=True)
class EmbeddingSet:
    """The words of a call. Immutable: a call keeps the set that it began with.

    Attributes:
        tokenizers: Of the text encoders, without the words.
        loaded: By name or file, by the caller.
        bundled: Of the LoRA files in use.
        listed: Of the folder `embeddings`; a word of the others takes precedence.
    """

    tokenizers: Mapping[str, Tokenizer]
    loaded: tuple[Embedding, ...] = ()
    bundled: tuple[Embedding, ...] = ()
    listed: tuple[Embedding, ...] = ()

    @cached_property
    def embeddings(self) -> tuple[Embedding, ...]:
        """All words, without those of the folder that others replace."""
        rest = (e for e in self.listed if self.taken.keys().isdisjoint(e.keys))
        return (*self.loaded, *self.bundled, *rest)

    @cached_property
    def taken(self) -> dict[str, str]:
        """By name, normalized, the words that precede those of the folder."""
        first = (*self.loaded, *self.bundled)
        return {key: embedding.word for embedding in first for key in embedding.keys}

    @cached_property
    def by_encoder(self) -> dict[str, EncoderWords]:
        """What each text encoder reads."""
        return {name: self._encoder_words(name) for name in self.tokenizers}

    def find_used(self, texts: Iterable[str]) -> list[Embedding]:
        """The embeddings whose words are in some of these texts."""
        tokenizer = next((words.tokenizer for words in self.by_encoder.values()), None)
        if tokenizer is None or not self.embeddings:
            return []
        ids = {i for text in texts for _, own in tokenizer.added.split(text) for i in own or ()}
        first, used = FIRST_WORD_ID, []
        for embedding in self.embeddings:
            following = first + embedding.num_vectors
            if not ids.isdisjoint(range(first, following)):
                used.append(embedding)
            first = following
        return used

    def _encoder_words(self, name: str) -> EncoderWords:
        tokenizer = self.tokenizers[name]
        if not self.embeddings:
            return EncoderWords(tokenizer, np.zeros((0, 0), np.float32))
        vectors = np.concatenate([embedding.by_encoder[name] for embedding in self.embeddings])
        words: dict[AddedToken, tuple[int, ...]] = {}
        first = FIRST_WORD_ID
        for embedding in self.embeddings:
            ids = tuple(range(first, first + embedding.num_vectors))
            rows = [ids, *((i,) for i in ids[1:])]
            words |= zip(embedding.tokens, rows, strict=True)
            first += embedding.num_vectors
        digest = hashlib.sha256(vectors.data).digest()
        return EncoderWords(tokenizer.with_words(words), vectors, digest)


def check_count(count: int) -> None:
    """Raise CheckpointError for more embeddings than a set may have."""
    if count > MAX_WORDS:
        raise CheckpointError(f"{count} embeddings; expected at most {MAX_WORDS}")


def check_words(
    embeddings: Sequence[Embedding],
    tokenizers: Mapping[str, Tokenizer],
    others: dict[str, str] | None = None,
) -> dict[str, str]:
    """Raise CheckpointError for a word that is a token of a vocabulary, or comes twice.

    others: the same of further embeddings, which are not checked again

    Returns:
        By name, normalized, the word of its embedding.
    """
    check_count(len(embeddings))
    seen: dict[str, str] = {}
    taken = ChainMap(seen, others or {})
    for embedding in embeddings:
        for name, key in zip(embedding.names, embedding.keys, strict=True):
            if any(tokenizer.has_token(key) for tokenizer in tokenizers.values()):
                raise CheckpointError(
                    f"the word {name!r} is a token of the model's vocabulary already",
                    hint="give the embedding another word",
                )
            if key in taken:
                raise CheckpointError(
                    f"the word {name!r} of {embedding.word!r} is one of {taken[key]!r} already",
                    hint="give one of the embeddings another word, or unload the other first",
                )
            seen[key] = embedding.word
    return seen


def _token(word: str) -> AddedToken:
    """A word between spaces or signs where it is letters, so that `cat` is not in `category`; a
    word such as `<cat>` matches anywhere.
    """
    return AddedToken(word, single_word=word[0].isalnum() and word[-1].isalnum())
