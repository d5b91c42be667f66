"""Prompt syntax: weighted words, several chunks of 75 tokens, `BREAK`.

- `(word)` has the weight 1.1, `[word]` 1 / 1.1, `(word:1.3)` 1.3; pairs within pairs multiply.
- `\\(` is a bracket that is text. So is a bracket without a partner.

Knows text and tokens; not what an encoder makes of them.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.errors import UsageError

from .tokenizer import FIRST_WORD_ID, Tokenizer, check_prompt

log = logging.getLogger(__name__)
EMPHASIS = 1.1
MAX_WEIGHT = 10.0
MAX_PRODUCT = 100.0  # of weights within weights
MAX_CHUNKS = 16
OPENING = {")": "(", "]": "["}
BREAK = re.compile(r"\s*\bBREAK\b\s*")
NUMBER = re.compile(r":\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\Z")


@dataclass(frozen=True, slots=True)
class Chunks:
    """A prompt for the encoder.

    Attributes:
        ids: [chunks, length] int32.
        weights: [chunks, length] float32, of each token.
        last_tokens: Tokens of the last chunk, without start and end.
    """

    ids: np.ndarray
    weights: np.ndarray
    last_tokens: int

    def __len__(self) -> int:
        return len(self.ids)


def chunks_from_prompt(
    prompt: str, tokenizer: Tokenizer, *, weighting: bool = True, chunking: bool = True
) -> Chunks:
    """Tokenize a prompt in chunks of `length - 2` tokens between start and end.

    Args:
        prompt: As the user wrote it.
        tokenizer: Of the text encoder.
        weighting: Whether brackets are weights; else they are text.
        chunking: Whether a long prompt goes on in another chunk, also at `BREAK`; else it is cut
            off, with a warning that quotes what the model does not read.

    Raises:
        UsageError: For a weight outside 0 to 10, and for a prompt that is not valid Unicode or is
            far too long.
    """
    check_prompt(prompt)
    literal = tokenizer.added.literal(prompt)
    parts = list(parse_prompt_attention(prompt, literal)) if weighting else [(prompt, 1.0)]
    rows: list[list[tuple[int, float]]] = [[]]
    room = tokenizer.length - 2
    cut: list[str] = []
    for text, weight in parts:
        for i, piece in enumerate(_split_at_breaks(text, tokenizer) if chunking else [text]):
            if i:
                rows.append([])
            for word, ids in tokenizer.words(piece):
                if chunking and _starts_chunk(ids, len(rows[-1]), room):
                    rows.append([])
                for token in ids:
                    if len(rows[-1]) == room and chunking:
                        rows.append([])
                    if len(rows[-1]) < room:
                        rows[-1].append((token, weight))
                    elif not cut or cut[-1] != word:
                        cut.append(word)
    if cut:
        log.warning("the model reads %d tokens; cut off: %r", room, " ".join(cut))
    if len(rows) > MAX_CHUNKS:
        raise UsageError(
            f"the prompt has {len(rows)} chunks of {room} tokens; expected at most {MAX_CHUNKS}"
        )
    return _pad(rows, tokenizer)


def _starts_chunk(ids: tuple[int, ...], length: int, room: int) -> bool:
    """Whether the vectors of a word of textual inversion would be cut apart at a chunk's end, where
    the AUTOMATIC1111 web UI begins another chunk.
    """
    return ids[0] >= FIRST_WORD_ID and length + len(ids) > room >= len(ids)


def _pad(rows: list[list[tuple[int, float]]], tokenizer: Tokenizer) -> Chunks:
    ids = np.full((len(rows), tokenizer.length), tokenizer.pad, np.int32)
    weights = np.ones((len(rows), tokenizer.length), np.float32)
    ids[:, 0] = tokenizer.start
    for i, row in enumerate(rows):
        ids[i, 1 : 1 + len(row)] = [token for token, _ in row]
        ids[i, 1 + len(row)] = tokenizer.end
        weights[i, 1 : 1 + len(row)] = [weight for _, weight in row]
    return Chunks(ids, weights, len(rows[-1]))


def _split_at_breaks(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The text's pieces between `BREAK`, unless that is part of an added token."""
    literal = tokenizer.added.literal(text)
    start = 0
    for match in BREAK.finditer(text):
        if not any(match.start() < span.stop and match.end() > span.start for span in literal):
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


def parse_prompt_attention(
    prompt: str, literal: Sequence[range] = ()
) -> Iterator[tuple[str, float]]:
    """Split a prompt, without its brackets, into parts of one weight each.

    Args:
        prompt: As the user wrote it.
        literal: Where brackets, colons and backslashes are text.

    Yields:
        Text and its weight.

    Raises:
        UsageError: For weights that are out of range.
    """
    letters, is_bracket, is_literal = _unescape(prompt, literal)
    factors: dict[int, float | None] = {}
    hidden, inner = set(), -1
    for low, high in _match_brackets(letters, is_bracket):
        weight, tail = EMPHASIS if letters[low] == "(" else 1.0 / EMPHASIS, high
        inner = max(low, inner)  # where the last pair within this one ends
        inner = max((i for i in range(inner + 1, high) if is_literal[i]), default=inner)
        number = NUMBER.search("".join(letters[inner + 1 : high]))
        if number and letters[low] == "(":
            weight, tail = _parse_weight(number[1], prompt), inner + 1 + number.start()
        hidden |= {low, *range(tail, high + 1)}
        factors[low], factors[high], inner = weight, None, high
    weights = list(_multiply_weights(factors, len(letters)))
    if max(weights, default=1.0) > MAX_PRODUCT:
        raise UsageError(f"the weights in {prompt[:60]!r} multiply to more than {MAX_PRODUCT:g}")
    start = 0
    for i in range(1, len(letters) + 1):
        if i == len(letters) or weights[i] != weights[start]:
            text = "".join(letters[j] for j in range(start, i) if j not in hidden)
            if text:
                yield text, weights[start]
            start = i


def _multiply_weights(factors: dict[int, float | None], count: int) -> Iterator[float]:
    """Each letter's weight, the product of the pairs around it.

    factors: of a pair its weight where it begins and None where it ends
    """
    outer: list[float] = []
    weight = 1.0
    for i in range(count):
        if i in factors:
            factor = factors[i]
            if factor is None:
                weight = outer.pop()
            else:
                outer.append(weight)
                weight *= factor
        yield weight


def _parse_weight(number: str, prompt: str) -> float:
    weight = float(number)
    if not 0.0 <= weight <= MAX_WEIGHT:
        raise UsageError(
            f"the weight {number} in {prompt[:60]!r}; expected 0 to {MAX_WEIGHT:g}",
            hint="write \\( for a bracket that is text",
        )
    return weight


def _unescape(prompt: str, literal: Sequence[range]) -> tuple[list[str], list[bool], list[bool]]:
    """Letters, whether each may be a bracket of a weight, and whether it is literal."""
    letters, is_bracket, is_literal = [], [], []
    inside = {i for span in literal for i in span}
    i = 0
    while i < len(prompt):
        escaped = prompt[i] == "\\" and prompt[i + 1 : i + 2] in ("(", ")", "[", "]", "\\")
        i += escaped and i not in inside
        letters.append(prompt[i])
        is_literal.append(i in inside)
        is_bracket.append(prompt[i] in "()[]" and not escaped and i not in inside)
        i += 1
    return letters, is_bracket, is_literal


def _match_brackets(letters: list[str], is_bracket: list[bool]) -> list[tuple[int, int]]:
    """Places of matching brackets, in the order of their ends: outer ones after inner ones."""
    open_at: list[int] = []
    waiting = {"(": 0, "[": 0}
    pairs = []
    for i, letter in enumerate(letters):
        if is_bracket[i] and letter in waiting:
            open_at.append(i)
            waiting[letter] += 1
        elif is_bracket[i] and waiting[OPENING[letter]]:
            while True:  # brackets within that have no partner are text
                low = open_at.pop()
                waiting[letters[low]] -= 1
                if letters[low] == OPENING[letter]:
                    break
            pairs.append((low, i))
    return pairs


def apply_weights(context: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weight the tokens of a chunk's context [tokens, width], and restore its mean.

    Args:
        context: [tokens, width].
        weights: [tokens].
    """
    if (weights == 1.0).all():
        return context
    scaled = context * weights[:, None]
    mean = scaled.mean()
    restored: np.ndarray = scaled * (context.mean() / mean) if mean else scaled
    return restored
