"""CLIP's byte-pair tokenizer, from `vocab.json` and `merges.txt`, without other libraries.

Radford et al. 2021 (arXiv:2103.00020); byte-level pairs of Sennrich et al. 2016 (arXiv:1508.07909)
with `</w>` at the end of a word. Knows text and token ids.
"""

import copy
import itertools
import unicodedata
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from sdrt.errors import BundleError, UsageError
from sdrt.json_validation import MAX_JSON, read_bytes, read_json, shorten

from .added_tokens import AddedToken, AddedTokens, added_tokens_from_json, normalize

START, END = "<|startoftext|>", "<|endoftext|>"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
MAX_PROMPT = 10_000
MAX_TOKENS = 1_000_000
FIRST_WORD_ID = MAX_TOKENS  # ids from here on are words of textual inversion
_Added = dict[int, AddedToken]


class Tokenizer:
    """Encodes text as the token ids that a text encoder reads."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        length: int,
        roles: Mapping[str, str],
        added: Mapping[int, AddedToken],
    ) -> None:
        """Create a tokenizer.

        Args:
            vocab: Ids by token.
            merges: Pairs to merge, the first first.
            length: Ids of every prompt, start and end included.
            roles: The tokens that begin and end a prompt, stand for unknown ones, and pad.
            added: Tokens that are matched before the others, by id.
        """
        self.vocab = vocab
        self.length = length
        ids = vocab | {token.content: number for number, token in added.items()}
        self.start, self.end, self.unknown, self.pad = (ids[roles[role]] for role in ROLES)
        self._added = added
        self._added_words = {normalize(token.content) for token in added.values()}
        self.added = AddedTokens(added)
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self._letters = byte_letters()
        self._word_ids = lru_cache(maxsize=4096)(self._encode_word)

    @classmethod
    def from_folder(
        cls, folder: Path, length: int, num_embeddings: int | None = None
    ) -> "Tokenizer":
        """Read `vocab.json`, `merges.txt` and, if it exists, `tokenizer_config.json`, which has the
        tokens with a role and the added ones.

        Args:
            folder: With these files.
            length: Ids of every prompt.
            num_embeddings: How many tokens the text encoder has; None is unknown.

        Raises:
            BundleError: If the files do not fit together.
        """
        vocab = _read_vocab(folder / "vocab.json")
        merges = _read_merges(folder / "merges.txt")
        roles, added = _read_special_tokens(folder / "tokenizer_config.json", vocab)
        ids = vocab | {token.content: number for number, token in added.items()}
        if len({*vocab.values(), *added}) != len(ids):
            raise BundleError(f"{folder}: a token has two ids, or an id has two tokens")
        if max(ids.values()) >= len(ids):
            raise BundleError(f"{folder}/vocab.json: expected the ids 0 to {len(ids) - 1}")
        if num_embeddings is not None and len(ids) > num_embeddings:
            raise BundleError(
                f"{folder}/vocab.json has {len(ids):,} tokens, the text encoder {num_embeddings:,}"
            )
        for pair in merges:
            if len(pair) != 2 or "".join(pair) not in vocab:
                raise BundleError(f"{folder}/merges.txt: {' '.join(pair)!r} is not in vocab.json")
        return cls(vocab, merges, length, roles, added)  # type: ignore[arg-type]

    def with_words(self, words: Mapping[AddedToken, tuple[int, ...]]) -> "Tokenizer":
        """One that also reads these words, each as its ids, from `FIRST_WORD_ID` on."""
        other = copy.copy(self)
        other.added = AddedTokens(self._added, words)
        return other

    def has_token(self, word: str) -> bool:
        """Whether a word, in lower case, is one token of the vocabulary, or an added one."""
        return word in self.vocab or f"{word}</w>" in self.vocab or word in self._added_words

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Token ids [len(texts), length] int32: start, the text's, end, padding."""
        return np.array([self._pad(text) for text in texts], np.int32)

    def ids(self, text: str) -> list[int]:
        """All token ids of a text, without start and end."""
        return [i for _, ids in self.words(text) for i in ids]

    def words(self, text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each word of a text with its token ids."""
        for piece, ids in self.added.split(check_prompt(text)):
            if ids is not None:
                yield piece, ids
                continue
            for word in _split_words(piece):
                yield word, self._word_ids(word)

    def _pad(self, text: str) -> list[int]:
        ids, room = self.ids(text), self.length - 2
        head = [self.start, *ids[:room], self.end]
        return head + [self.pad] * (self.length - len(head))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        letters = [self._letters[byte] for byte in word.encode("utf-8")]
        letters[-1] += "</w>"
        return tuple(self.vocab.get(piece, self.unknown) for piece in self._merge(letters))

    def _merge(self, pieces: list[str]) -> list[str]:
        """Merge the best-ranked pair wherever it occurs, until none is left."""
        while len(pieces) > 1:
            best = min(
                itertools.pairwise(pieces),
                key=lambda pair: self.rank.get(pair, len(self.rank)),
            )
            if best not in self.rank:
                break
            pieces = _join(pieces, best)
        return pieces


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
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


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    valid = all(type(number) is int and 0 <= number < MAX_TOKENS for number in vocab.values())
    if not valid or not vocab or len(set(vocab.values())) < len(vocab):
        raise BundleError(f"{path}: two tokens have one id, or an id is not an integer in range")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, ...]]:
    try:
        lines = read_bytes(path, MAX_JSON).decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    return [tuple(line.split()) for line in lines if line and not line.startswith("#version")]


def _read_special_tokens(path: Path, vocab: Mapping[str, int]) -> tuple[dict[str, str], _Added]:
    """The tokens with a role, and all added tokens by id; raises BundleError."""
    config = read_json(path) if path.is_file() else {}
    try:
        added = added_tokens_from_json(config.get("added_tokens_decoder", {}), "its added_tokens")
    except ValueError as error:
        raise BundleError(f"{path} cannot be used: {error}") from error
    roles = {role: config.get(role, START if role == "bos_token" else END) for role in ROLES}
    contents = {token.content for token in added.values()}
    for role, content in roles.items():
        if not isinstance(content, str) or content not in contents | set(vocab):
            raise BundleError(f"{path.parent}/vocab.json lacks the {role}, {shorten(content)}")
        if content not in contents:  # a token with a role is matched like added tokens
            added[vocab[content]] = AddedToken(content, special=True, normalized=False)
            contents.add(content)
    return roles, added


def byte_letters() -> list[str]:
    """The printable letter of each byte value 0 to 255: GPT-2's alphabet."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def check_prompt(text: str) -> str:
    """Return the prompt; raises UsageError if it is too long or not valid Unicode."""
    if len(text) > MAX_PROMPT:
        raise UsageError(
            f"the prompt has {len(text):,} characters; expected at most {MAX_PROMPT:,}",
            hint="a model reads about 75 words at a time",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt is not valid Unicode: a lone surrogate at character {error.start}",
            hint="pass it as UTF-8",
        ) from error
    return text


def _letter_class(letter: str) -> str:
    """`L`etter, `N`umber, `S`pace or other."""
    if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f":
        return "S"
    major = unicodedata.category(letter)[0]
    return major if major in "LN" else "other"


def _split_words(text: str) -> Iterator[str]:
    i = 0
    while i < len(text):
        if token := next((t for t in (START, END) if text.startswith(t, i)), None):
            yield from ("<|", token[2:-2], "|>")  # written in capitals, so it is text
            i += len(token)
            continue
        suffix = next((s for s in SUFFIXES if text.startswith(s, i)), None)
        kind = _letter_class(text[i])
        end = i + (len(suffix) if suffix else 1)
        if not suffix and kind in ("L", "other"):
            while end < len(text) and _letter_class(text[end]) == kind:
                end += 1
        if kind != "S":
            yield text[i:end]
        i = end
