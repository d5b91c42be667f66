"""Tokens that were added to a vocabulary. They are matched before byte pairs, one id each.

The order and the flags are those of Hugging Face's tokenizers:

- Tokens that are not normalized match the text as it is written, the others its normalized rest.
- The leftmost match wins, and among those the longest.

Knows text and token ids.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sdrt.errors import UsageError
from sdrt.json_validation import boolean, mapping, record, text

MAX_ADDED_TOKENS, MAX_CONTENT, MAX_EXPANDED = 10_000, 256, 100_000
SPACES = re.compile(r"[^\S\x1c-\x1f]+")
SYNTAX = re.compile(r"[()\[\]\\:]|BREAK")  # what has a meaning of its own in a prompt


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token's text and how it matches, by the names of `added_tokens_decoder`.

    Attributes:
        content: The text.
        special: Whether it is not part of the vocabulary's language, such as padding.
        normalized: Whether it matches the normalized text, so upper and lower case alike.
        lstrip: Whether spaces before it belong to the match.
        rstrip: Whether spaces after it belong to the match.
        single_word: Whether it matches only where no word continues on either side.
    """

    content: str
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


_FLAGS = {field.name: boolean for field in fields(AddedToken) if field.name != "content"}
_CONTENT = text(rf"(?s:.){{1,{MAX_CONTENT}}}", f"a text of 1 to {MAX_CONTENT} characters")
_TOKEN = record(AddedToken, {"content": _CONTENT, **_FLAGS})
_BY_ID = mapping(_TOKEN, text(r"0|[1-9][0-9]{0,6}", "an id"), MAX_ADDED_TOKENS)


def added_tokens_from_json(value: Any, where: str) -> dict[int, AddedToken]:
    """Parse added tokens by id; raises ValueError for a value that is not a token, or one twice."""
    read = {int(number): token for number, token in _BY_ID(value, where).items()}
    if len({token.content for token in read.values()}) < len(read):
        raise ValueError(f"{where} has a token twice")
    return read


def normalize(text: str) -> str:
    """Unicode's composed form, single spaces, lower case letter by letter."""
    composed = SPACES.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(letter.lower() for letter in composed)


class AddedTokens:
    """Finds added tokens in prompts."""

    def __init__(
        self,
        tokens: Mapping[int, AddedToken],
        words: Mapping[AddedToken, tuple[int, ...]] | None = None,
    ) -> None:
        """Create a matcher.

        Args:
            tokens: By id.
            words: Tokens that stand for several ids, or for ids outside the vocabulary.
        """
        # Of two tokens of one text the first counts; transformers' choice varies from run to run.
        ordered = sorted(tokens.items())
        self._ids = {token.content: number for number, token in ordered}
        self._word_ids = {token.content: ids for token, ids in (words or {}).items()}
        every = [*(token for _, token in ordered), *(words or ())]
        self._as_written = _Matcher((t.content, t) for t in every if not t.normalized)
        self._normalized = _Matcher((normalize(t.content), t) for t in every if t.normalized)
        self._has_syntax = any(SYNTAX.search(token.content) for token in every)
        self._vectors = {name: all_of for name in self._ids if (all_of := self._all_vectors(name))}

    def split(self, prompt: str) -> Iterator[tuple[str, tuple[int, ...] | None]]:
        """Added tokens with their ids, and the normalized text between them with None."""
        for piece, token in self._as_written.split(self._expand(prompt)):
            if token is not None:
                yield piece, self._ids_of(token)
                continue
            for part, match in self._normalized.split(normalize(piece)):
                yield part, None if match is None else self._ids_of(match)

    def _ids_of(self, token: AddedToken) -> tuple[int, ...]:
        ids = self._word_ids.get(token.content)
        return (self._ids[token.content],) if ids is None else ids

    def literal(self, prompt: str) -> list[range]:
        """Where a prompt has added tokens, if any of them could be mistaken for syntax."""
        if not self._has_syntax:
            return []
        lower = [letter.lower() for letter in prompt]
        origin = [i for i, letters in enumerate(lower) for _ in letters] + [len(prompt)]
        spans = [range(start, stop) for start, stop, _ in self._as_written.spans(prompt)]
        for start, stop, _ in self._normalized.spans("".join(lower)):
            spans.append(range(origin[start], origin[stop]))
        return spans

    def _all_vectors(self, name: str) -> str | None:
        """All vectors of a word that has several: `word`, `word_1`, `word_2` and so on."""
        names = [name]
        while (following := f"{name}_{len(names)}") in self._ids:
            names.append(following)
        return " ".join(names) if len(names) > 1 else None

    def _expand(self, prompt: str) -> str:
        """The prompt with all vectors of each word that has several, as in textual inversion;
        raises UsageError for a prompt that becomes far too long.
        """
        if not any(name in prompt for name in self._vectors):
            return prompt
        tokens = [token for _, token in self._find(prompt)]
        for name in dict.fromkeys(token.content for token in tokens):
            if (vectors := self._vectors.get(name)) is None:
                continue
            length = len(prompt) + prompt.count(name) * (len(vectors) - len(name))
            if length > MAX_EXPANDED:
                raise UsageError(
                    f"the vectors of {name!r} make a prompt of {length:,} characters; "
                    f"expected at most {MAX_EXPANDED:,}"
                )
            prompt = prompt.replace(name, vectors)
        return prompt

    def _find(self, prompt: str) -> Iterator[tuple[str, AddedToken]]:
        for piece, token in self._as_written.split(prompt):
            inner = [(piece, token)] if token else self._normalized.split(normalize(piece))
            yield from ((part, match) for part, match in inner if match is not None)


class _Matcher:
    """Finds the leftmost longest of some texts."""

    def __init__(self, patterns: Iterable[tuple[str, AddedToken]]) -> None:
        """Match these texts; of two that are equal the first counts."""
        self._tokens: dict[str, AddedToken] = {}
        for pattern, token in patterns:
            self._tokens.setdefault(pattern, token)
        lengths: dict[str, set[int]] = {}
        for pattern in self._tokens:
            lengths.setdefault(pattern[0], set()).add(len(pattern))
        self._lengths = {first: sorted(of, reverse=True) for first, of in lengths.items()}
        firsts = "".join(map(re.escape, self._lengths))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def split(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        """Matches with their tokens, and the text between them with None."""
        done = 0
        for start, stop, token in self.spans(text):
            pattern = text[start:stop]
            if token.lstrip:
                start = max(len(text[:start].rstrip(_SPACES)), done)
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip(_SPACES))
            if start >= stop:  # only spaces that belong to the previous match
                continue
            if done < start:
                yield text[done:start], None
            yield pattern, token
            done = stop
        if done < len(text):
            yield text[done:], None

    def spans(self, text: str) -> Iterator[tuple[int, int, AddedToken]]:
        """Start, end and token of every match."""
        at = 0
        while self._first and (candidate := self._first.search(text, at)):
            start = candidate.start()
            stops = [start + length for length in self._lengths[text[start]]]
            fit = (stop for stop in stops if stop <= len(text))
            stop = next((stop for stop in fit if text[start:stop] in self._tokens), None)
            if stop is None:
                at = start + 1
                continue
            at = stop
            token = self._tokens[text[start:stop]]
            inside = (start > 0 and _is_word_letter(text[start - 1])) or _is_word_letter(
                text[stop : stop + 1]
            )
            if not (token.single_word and inside):
                yield start, stop, token


_SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
# Symbols that Unicode counts as alphabetic: circled and squared letters.
_LETTER_SYMBOLS = {*range(0x24B6, 0x24EA), *range(0x1F130, 0x1F14A)}
_LETTER_SYMBOLS |= {*range(0x1F150, 0x1F16A), *range(0x1F170, 0x1F18A)}


def _is_word_letter(letter: str) -> bool:
    r"""Whether a letter, or none, is `\w` to Unicode's regular expressions (UTS 18, annex C)."""
    if not letter:
        return False
    category = unicodedata.category(letter)
    counted = category[0] in "LM" or category in ("Nd", "Nl", "Pc")
    return counted or letter in "\u200c\u200d" or ord(letter) in _LETTER_SYMBOLS
