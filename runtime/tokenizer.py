"""CLIP's byte-pair tokenizer, from `vocab.json` and `merges.txt`; no library needed.

Knows text and ids. Radford et al. 2021 (arXiv:2103.00020), byte-level pairs after Sennrich et al.
2016 (arXiv:1508.07909) with `</w>` at the end of a word.
"""

import itertools
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from sdrt.errors import BundleError, UsageError
from sdrt.reading import MOST_JSON, read_bytes, read_json, shortened

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
LONGEST_PROMPT = 10_000
MOST_TOKENS = 1_000_000


class Tokenizer:
    """Text to the ids that the text encoder reads."""

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int, pad: str = END
    ) -> None:
        """length: the number of ids of every prompt, start and end included
        pad: the token that fills what a prompt leaves; the end again, but for OpenCLIP's encoders
        """
        self.vocab = vocab
        self.length = length
        self.pad = vocab[pad]
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self._letters = byte_letters()
        self._word_ids = lru_cache(maxsize=4096)(self._ids_from_word)

    @classmethod
    def from_folder(cls, folder: Path, length: int, embedded: int | None = None) -> "Tokenizer":
        """Read `vocab.json`, `merges.txt` and, where there is one, `tokenizer_config.json` for the
        token that pads; raises BundleError if they do not fit together.

        embedded: how many tokens the text encoder knows
        """
        vocab = read_json(folder / "vocab.json")
        merges = _merges_from(folder / "merges.txt")
        config = folder / "tokenizer_config.json"
        pad = read_json(config).get("pad_token") if config.is_file() else END
        ids = set(vocab.values()) if {type(i) for i in vocab.values()} == {int} else set()
        if not ids or len(ids) != len(vocab) or not (0 <= min(ids) <= max(ids) < MOST_TOKENS):
            raise BundleError(
                f"{folder}/vocab.json gives two tokens one number, or one that is none"
            )
        if max(ids) >= len(ids):
            raise BundleError(f"{folder}/vocab.json: its ids are not 0 to {len(ids) - 1}")
        if embedded is not None and len(ids) > embedded:
            raise BundleError(
                f"{folder}/vocab.json has {len(ids):,} tokens, the text encoder {embedded:,}"
            )
        for pair in merges:
            if len(pair) != 2 or "".join(pair) not in vocab:
                raise BundleError(f"{folder}/merges.txt: {' '.join(pair)!r} is not in vocab.json")
        if not isinstance(pad, str) or not {START, END, pad} <= set(vocab):
            raise BundleError(f"{folder}/vocab.json lacks {START}, {END} or {shortened(pad)}")
        return cls(vocab, merges, length, pad)  # type: ignore[arg-type]

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Ids [len(texts), length] int32: start, the text's, end, and padding."""
        return np.array([self._padded(text) for text in texts], np.int32)

    def ids(self, text: str) -> list[int]:
        """All ids of a text, without start and end."""
        return [i for _, ids in self.words(text) for i in ids]

    def words(self, text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each word of a text with its ids."""
        for word in words_from_text(checked(text)):
            yield word, self._word_ids(word)

    def _padded(self, text: str) -> list[int]:
        ids, room = self.ids(text), self.length - 2
        head = [self.vocab[START], *ids[:room], self.vocab[END]]
        return head + [self.pad] * (self.length - len(head))

    def _ids_from_word(self, word: str) -> tuple[int, ...]:
        if word in (START, END):
            return (self.vocab[word],)
        letters = [self._letters[byte] for byte in word.encode("utf-8")]
        letters[-1] += "</w>"
        unknown = self.vocab[END]
        return tuple(self.vocab.get(piece, unknown) for piece in self._merged(letters))

    def _merged(self, pieces: list[str]) -> list[str]:
        """Join the best-ranked pair, everywhere it occurs, until none is left."""
        while len(pieces) > 1:
            best = min(
                itertools.pairwise(pieces),
                key=lambda pair: self.rank.get(pair, len(self.rank)),
            )
            if best not in self.rank:
                break
            pieces = _joined(pieces, best)
        return pieces


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(pieces):
        if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == pair:
            out.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            out.append(pieces[i])
            i += 1
    return out


def _merges_from(path: Path) -> list[tuple[str, ...]]:
    try:
        lines = read_bytes(path, MOST_JSON).decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    return [tuple(line.split()) for line in lines if line and not line.startswith("#version")]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte value 0 to 255 (GPT-2's alphabet)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def checked(text: str) -> str:
    """The text, or UsageError: too long, or not valid Unicode."""
    if len(text) > LONGEST_PROMPT:
        raise UsageError(
            f"a prompt of {len(text):,} characters; at most {LONGEST_PROMPT:,} are accepted, "
            "and a model reads about 75 words"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not valid Unicode: a lone surrogate at character {error.start}; "
            "pass it as UTF-8"
        ) from error
    return text


def words_from_text(text: str) -> Iterator[str]:
    """Split normalised text: special tokens, English suffixes, runs of letters, single digits,
    runs of anything else.
    """
    for i, part in enumerate(_split_specials(text)):
        if i % 2:
            yield part
        else:
            composed = unicodedata.normalize("NFC", part)
            yield from _plain_words("".join(letter.lower() for letter in composed))


def _split_specials(text: str) -> list[str]:
    """Plain text at even places, special tokens at odd ones."""
    parts: list[str] = []
    while True:
        places = [(text.find(token), token) for token in (START, END) if token in text]
        if not places:
            return [*parts, text]
        at, token = min(places)
        parts += [text[:at], token]
        text = text[at + len(token) :]


def _kind(letter: str) -> str:
    """`L`etter, `N`umber, `S`pace or other."""
    if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f":
        return "S"
    major = unicodedata.category(letter)[0]
    return major if major in "LN" else "other"


def _plain_words(text: str) -> Iterator[str]:
    i = 0
    while i < len(text):
        if token := next((t for t in (START, END) if text.startswith(t, i)), None):
            yield from ("<|", token[2:-2], "|>")  # written in capitals, so it is text
            i += len(token)
            continue
        suffix = next((s for s in SUFFIXES if text.startswith(s, i)), None)
        kind = _kind(text[i])
        end = i + (len(suffix) if suffix else 1)
        if not suffix and kind in ("L", "other"):
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "S":
            yield text[i:end]
        i = end
