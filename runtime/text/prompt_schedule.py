"""Prompts that change during a run, and several joined by `AND`: the web UI's syntax (A1111).

- `[from:to:when]` reads `to` after step `when`; `[to:when]` adds it then, and `[from::when]`
  removes it. `when` is a fraction of the run if it has a point, else a number of steps.
- `[a|b]` takes turns, step by step.
- `a AND b:0.5` steers by both prompts, the second with half the weight.

All may be nested, and stand within weights. Brackets and colons that are none of this are text, as
they are there; a `|` outside of brackets makes all of them text. Where a bracket without a partner
touches a change, A1111's parser (lark 1.1.2) reads it by the order of a set; here it is a change.

Knows text and steps; not tokens, nor what a model makes of them.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

from sdrt.errors import UsageError

AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(r"[+-]?(?:[0-9]+\.?|[0-9]*\.[0-9]+)")
WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
TOKEN = re.compile(r"\\.|[^\\()\[\]:|]+|[()\[\]:|]")
OPENING = {")": "(", "]": "["}
MAX_JOINED = 16  # prompts
MAX_JOINED_WEIGHT = 100.0
MAX_NESTING = 64  # changes within changes


@dataclass(frozen=True, slots=True)
class Edit:
    """`[before:after:when]`."""

    before: "Parts"
    after: "Parts"
    when: str


@dataclass(frozen=True, slots=True)
class Alternation:
    """`[a|b|..]`."""

    options: "tuple[Parts, ...]"


Part = str | Edit | Alternation
Parts = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class PromptSchedule:
    """A prompt's texts in the order of their use.

    Attributes:
        last_steps: The last step of each text, ascending; the last one is the number of steps.
        texts: Of the same count.
    """

    last_steps: tuple[int, ...]
    texts: tuple[str, ...]

    def text_at(self, step: int) -> str:
        """The text of a step, counted from 0. A1111 compares that with last steps counted from 1,
        so the first text lasts one step longer than it says.
        """
        return self.texts[min(bisect_left(self.last_steps, step), len(self.texts) - 1)]


def parse_prompt_schedule(
    prompt: str, steps: int, first_pass_steps: int | None = None
) -> PromptSchedule:
    """Parse a prompt that may change.

    Args:
        prompt: As the user wrote it; weights remain in the texts.
        steps: Of the run; for samplers with two evaluations a step twice as many, and all step
            numbers count evaluations, as in A1111.
        first_pass_steps: In a second pass, the first one's steps. Numbers of steps then count on
            from there, and fractions from 1 to 2 are of this pass.

    Raises:
        UsageError: Changes are nested too deeply.
    """
    parts = _parse(prompt)
    if parts is None:
        return PromptSchedule((steps,), (prompt,))
    last_steps = {steps}
    for node in _walk(parts):
        if isinstance(node, Alternation):
            last_steps |= set(range(1, steps + 1))
        else:
            last_steps.add(_last_step(node.when, steps, first_pass_steps))
    ordered = tuple(sorted(last_steps - {0}))
    texts = (_render(parts, end, steps, first_pass_steps) for end in ordered)
    return PromptSchedule(ordered, tuple("".join(text) for text in texts))


def split_prompts(prompt: str) -> list[tuple[str, float]]:
    """The prompts that `AND` joins, with their weights: `a AND b:0.5`.

    Without an `AND` there is one, and a number at its end is text.

    Raises:
        UsageError: Too many prompts, or a weight out of range.
    """
    pieces = AND.split(prompt)
    if len(pieces) == 1:
        return [(prompt, 1.0)]
    if len(pieces) > MAX_JOINED:
        raise UsageError(f"AND joins {len(pieces)} prompts; expected at most {MAX_JOINED}")
    return [_split_weight(piece.rstrip()) for piece in pieces]


def _split_weight(prompt: str) -> tuple[str, float]:
    text, _, number = prompt.rpartition(":")
    if not WEIGHT.fullmatch(number.strip()) or len(number) == len(prompt):
        return prompt, 1.0
    weight = float(number)
    if not -MAX_JOINED_WEIGHT <= weight <= MAX_JOINED_WEIGHT:
        limit = f"{MAX_JOINED_WEIGHT:g}"
        raise UsageError(f"the weight {weight:g} of {text[:60]!r}; expected -{limit} to {limit}")
    return text.rstrip(), weight


def refuse_single_weight(prompt: str) -> None:
    """Raise UsageError for `a cat:2`. A1111 reads the number as the weight of the prompt also where
    no `AND` joins others, which scales its guidance; here it is text.
    """
    weight = 1.0 if AND.search(prompt) else _split_weight(prompt.rstrip())[1]
    if weight != 1.0:
        raise UsageError(
            f"the number at the prompt's end multiplies its guidance by {weight:g} there, which is "
            "unsupported",
            hint="leave it out and multiply --guidance-scale",
        )


@dataclass(slots=True)
class _Bracket:
    """An open bracket: its letter and what it holds so far, split at colons and bars."""

    letter: str
    segments: list[list[Part]] = field(default_factory=lambda: [[]])
    separators: str = ""

    def as_text(self) -> Iterator[Part]:
        """What it holds where it is no construct."""
        yield self.letter
        for separator, segment in zip(("", *self.separators), self.segments, strict=True):
            yield separator
            yield from segment

    def close(self, letter: str) -> list[Part] | None:
        """What it stands for; None if it is no construct."""
        bars, colons = self.separators.count("|"), self.separators.count(":")
        if not self.separators or (self.letter == "(" and self.separators == ":"):
            return _join_texts([*self.as_text(), letter])
        if self.letter == "(" or (bars and colons):
            return None
        *prompts, last = (tuple(segment) for segment in self.segments)
        if bars:
            return [Alternation((*prompts, last))]
        when = WHEN.fullmatch("".join(p if isinstance(p, str) else "[" for p in last))
        if colons > 2 or not when:
            return None
        before = prompts[0] if colons == 2 else ()
        return [Edit(before, prompts[-1], when[1])]


def _join_texts(parts: list[Part]) -> list[Part]:
    """The same with neighbouring texts as one, so that deep nesting does not copy many."""
    joined: list[Part] = []
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        neighbours = list(group)
        joined += ["".join(map(str, neighbours))] if is_text else neighbours
    return joined


@lru_cache(maxsize=64)
def _parse(prompt: str) -> Parts | None:
    """None where A1111's parser gives up, and all of the prompt is text."""
    top = _Bracket("")
    open_brackets: list[_Bracket] = []

    def give_up() -> None:
        """No open bracket is a construct: one that is text may not stand within another."""
        for bracket in open_brackets:
            top.segments[-1] += bracket.as_text()
            top.separators += bracket.separators.replace(":", "")
        open_brackets.clear()

    end = 0
    for match in TOKEN.finditer(prompt):
        if match.start() != end:
            return None  # a backslash with nothing to escape
        end, token = match.end(), match[0]
        if token in ("(", "["):
            open_brackets.append(_Bracket(token))
        elif token in OPENING:
            value = None
            if open_brackets and open_brackets[-1].letter == OPENING[token]:
                value = open_brackets[-1].close(token)
            if value is None:
                give_up()
                top.segments[-1].append(token)
            else:
                open_brackets.pop()
                (open_brackets or [top])[-1].segments[-1] += value
        elif token in (":", "|") and open_brackets:
            open_brackets[-1].separators += token
            open_brackets[-1].segments.append([])
        else:
            (open_brackets or [top])[-1].segments[-1].append(token)
            top.separators += "|" if token == "|" else ""
    give_up()
    if end != len(prompt) or top.separators:
        return None
    return tuple(top.segments[0])


def _walk(parts: Parts, depth: int = 0) -> Iterator[Edit | Alternation]:
    """All changes of a prompt."""
    if depth > MAX_NESTING:
        raise UsageError(f"the prompt nests more than {MAX_NESTING} changes")
    for part in parts:
        if not isinstance(part, str):
            yield part
            inner = part.options if isinstance(part, Alternation) else (part.before, part.after)
            for option in inner:
                yield from _walk(option, depth + 1)


def _render(parts: Parts, step: int, steps: int, first_pass_steps: int | None) -> Iterator[str]:
    """The text of a step, counted from 1."""
    for part in parts:
        if isinstance(part, str):
            yield part
            continue
        if isinstance(part, Alternation):
            chosen = part.options[(step - 1) % len(part.options)]
        else:
            before = step <= _last_step(part.when, steps, first_pass_steps)
            chosen = part.before if before else part.after
        yield from _render(chosen, step, steps, first_pass_steps)


def _last_step(when: str, steps: int, first_pass_steps: int | None) -> int:
    """The last step before a change, counted from 1; 0 if the run begins after it."""
    is_fraction = "." in when
    value = float(when)
    if first_pass_steps is not None:
        value -= 1.0 if is_fraction else first_pass_steps
    return int(min(max(value * steps if is_fraction else value, 0.0), steps))
