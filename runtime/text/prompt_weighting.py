"""Prompts as users write them: attention to words, several stretches of 75 tokens, `BREAK`.

Knows text and tokens; not what an encoder makes of them. `(word)` weighs 1.1, `[word]` 1 / 1.1,
`(word:1.3)` what it says; `\\(` is a bracket. Brackets without a partner are text.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.errors import UsageError

from .tokenizer import Tokenizer, checked

log = logging.getLogger(__name__)
STEP = 1.1
MAX_WEIGHT = 10.0
MAX_PRODUCT = 100.0  # of brackets in brackets
MAX_CHUNKS = 16
PARTNER = {")": "(", "]": "["}
AND = re.compile(r"\bAND\b")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
NUMBER = re.compile(r":\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\Z")


@dataclass(frozen=True, slots=True)
class Chunks:
    """A prompt for the encoder: ids [n, length] int32, and each token's weight [n, length]."""

    ids: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def chunks_from_prompt(
    prompt: str, tokenizer: Tokenizer, *, weighting: bool = True, chunking: bool = True
) -> Chunks:
    """A prompt as stretches of `length - 2` tokens between start and end.

    weighting: read brackets as attention, else as text. chunking: go on in another stretch after
    the first, and at `BREAK`; else warn, quoting what the model will not read.
    Raises UsageError for a weight outside 0 to 10, a prompt that is not Unicode or far too long.
    """
    checked(prompt)
    literal = tokenizer.added.literal(prompt)
    parts = list(weighted_parts(prompt, literal)) if weighting else [(prompt, 1.0)]
    rows: list[list[tuple[int, float]]] = [[]]
    room = tokenizer.length - 2
    cut: list[str] = []
    for text, weight in parts:
        for i, piece in enumerate(_split_at_breaks(text, tokenizer) if chunking else [text]):
            if i:
                rows.append([])
            for word, ids in tokenizer.words(piece):
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
        raise UsageError(f"a prompt of {len(rows)} stretches of {room} tokens; at most 16 are read")
    return _padded(rows, tokenizer)


def _padded(rows: list[list[tuple[int, float]]], tokenizer: Tokenizer) -> Chunks:
    ids = np.full((len(rows), tokenizer.length), tokenizer.pad, np.int32)
    weights = np.ones((len(rows), tokenizer.length), np.float32)
    ids[:, 0] = tokenizer.start
    for i, row in enumerate(rows):
        ids[i, 1 : 1 + len(row)] = [token for token, _ in row]
        ids[i, 1 + len(row)] = tokenizer.end
        weights[i, 1 : 1 + len(row)] = [weight for _, weight in row]
    return Chunks(ids, weights)


def _split_at_breaks(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The text's pieces between `BREAK`, unless that is part of an added token."""
    literal = tokenizer.added.literal(text)
    start = 0
    for match in BREAK.finditer(text):
        if not any(match.start() < span.stop and match.end() > span.start for span in literal):
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


def weighted_parts(prompt: str, literal: Sequence[range] = ()) -> Iterator[tuple[str, float]]:
    """The prompt without its brackets, in pieces of one weight each.

    literal: where brackets, colons and backslashes are text
    """
    letters, special, fixed = _unescaped(prompt, literal)
    factors: dict[int, float | None] = {}
    hidden, inner = set(), -1
    for low, high in _pairs(letters, special):
        weight, tail = STEP if letters[low] == "(" else 1.0 / STEP, high
        inner = max(low, inner)  # where the last pair within this one ends
        inner = max((i for i in range(inner + 1, high) if fixed[i]), default=inner)
        number = NUMBER.search("".join(letters[inner + 1 : high]))
        if number and letters[low] == "(":
            weight, tail = _weight(number[1], prompt), inner + 1 + number.start()
        hidden |= {low, *range(tail, high + 1)}
        factors[low], factors[high], inner = weight, None, high
    weights = list(_products(factors, len(letters)))
    if max(weights, default=1.0) > MAX_PRODUCT:
        raise UsageError(f"attention in {prompt[:60]!r} multiplies to more than {MAX_PRODUCT:g}")
    start = 0
    for i in range(1, len(letters) + 1):
        if i == len(letters) or weights[i] != weights[start]:
            text = "".join(letters[j] for j in range(start, i) if j not in hidden)
            if text:
                yield text, weights[start]
            start = i


def check_constant(prompt: str, joined: bool = True) -> None:
    """Raise UsageError for what the AUTOMATIC1111 web UI reads as a prompt that changes during the
    run, `[from:to:0.5]` and `[a|b]`, and as several prompts, `AND`: neither is supported.

    joined: whether `AND` is read, as it is there in all but negative prompts
    """
    letters, special, _ = _unescaped(prompt, ())
    for low, high in _pairs(letters, special):
        inside = "".join(letters[low + 1 : high])
        if letters[low] == "[" and ("|" in inside or NUMBER.search(inside)):
            raise UsageError(
                f"the prompt changes during the run at {f'[{inside}]'[:60]!r}, which is not "
                "supported; leave it out, or write \\[ for a bracket"
            )
    if joined and AND.search(prompt):
        raise UsageError(
            "the prompt has AND, which joins several prompts and is not supported; write it in "
            "lower case to have it read as text"
        )


def _products(factors: dict[int, float | None], count: int) -> Iterator[float]:
    """Each letter's weight: the product of the pairs around it. A pair has its factor where it
    begins and None where it ends.
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


def _weight(number: str, prompt: str) -> float:
    weight = float(number)
    if not 0.0 <= weight <= MAX_WEIGHT:
        raise UsageError(
            f"attention {number} in {prompt[:60]!r}; expected 0 to {MAX_WEIGHT:g}, or write \\( "
            "for a bracket"
        )
    return weight


def _unescaped(prompt: str, literal: Sequence[range]) -> tuple[list[str], list[bool], list[bool]]:
    """Letters, whether each may be a bracket of attention, and whether it is literal."""
    letters, special, fixed = [], [], []
    inside = {i for span in literal for i in span}
    i = 0
    while i < len(prompt):
        escaped = prompt[i] == "\\" and prompt[i + 1 : i + 2] in ("(", ")", "[", "]", "\\")
        i += escaped and i not in inside
        letters.append(prompt[i])
        fixed.append(i in inside)
        special.append(prompt[i] in "()[]" and not escaped and i not in inside)
        i += 1
    return letters, special, fixed


def _pairs(letters: list[str], special: list[bool]) -> list[tuple[int, int]]:
    """Places of brackets that belong together, as they end: outer ones after inner ones."""
    open_at: list[int] = []
    waiting = {"(": 0, "[": 0}
    pairs = []
    for i, letter in enumerate(letters):
        if special[i] and letter in waiting:
            open_at.append(i)
            waiting[letter] += 1
        elif special[i] and waiting[PARTNER[letter]]:
            while True:  # those within that have no partner are text
                low = open_at.pop()
                waiting[letters[low]] -= 1
                if letters[low] == PARTNER[letter]:
                    break
            pairs.append((low, i))
    return pairs


def apply_weights(context: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The context of one stretch [tokens, width] with its tokens weighed, its mean kept."""
    if (weights == 1.0).all():
        return context
    heavier = context * weights[:, None]
    mean = heavier.mean()
    restored: np.ndarray = heavier * (context.mean() / mean) if mean else heavier
    return restored
