"""Settings by pattern of module name, as PEFT keeps them: regular expressions from files.

Python's own matcher backtracks, so that a short pattern may run for years. Here a pattern is
matched by the set of positions that it can have reached, every step is counted, and a file has a
number of steps. Understood: literals, `.`, classes, groups, `|`, repetition, `^` and `$`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MAX_PATTERN = 256  # characters
MAX_GROUPS = 20
MAX_REPEAT = 1000
MAX_STEPS = 20_000_000  # of all patterns of a part together
ONE = r"\[\^?(?:\\[dws.]|[\w.-])+\]|\\[dwsDWS]|\."
TOKEN = re.compile(
    rf"(?P<one>{ONE})|\\(?P<escaped>[^\w\s])|(?P<group>\((?:\?:)?)|(?P<end>[|)])|(?P<edge>[$^])"
    r"|(?P<literal>[^\\()|*+?{}\[\]])"
)
REPEAT = re.compile(r"(?:([*+?])|\{(\d+)\}|\{(\d*),(\d*)\})\??(?![*+?{])")
SIGNS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
Node = Callable[[str, set[int]], set[int]]  # from where it starts to where it can end


@dataclass(slots=True)
class Steps:
    """How many steps are left; shared by all patterns of a part."""

    left: int

    def take(self, count: int) -> None:
        self.left -= count + 1
        if self.left < 0:
            raise ValueError("its patterns take too long to match")


class Patterns:
    """Values by pattern: a module's is that of the first pattern that matches the end of its name,
    from its start or after a dot, as `peft.utils.get_pattern_key` has it.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        """Raises ValueError for a pattern that is not understood."""
        steps = Steps(MAX_STEPS)
        self._nodes = [(_Parser(text, steps).parse(), value) for text, value in values.items()]

    def get(self, module: str, default: float | None) -> float | None:
        """Raises ValueError where matching takes too long."""
        starts = {0} | {i + 1 for i, letter in enumerate(module) if letter == "."}
        for node, value in self._nodes:
            if len(module) in node(module, starts):
                return value
        return default


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, text: str, steps: Steps) -> None:
        if len(text) > MAX_PATTERN:
            raise ValueError(f"a pattern of {len(text):,} characters; at most {MAX_PATTERN}")
        if text.count("(") > MAX_GROUPS:
            raise ValueError(f"a pattern of {text.count('(')} groups; at most {MAX_GROUPS}")
        self._text, self._at, self._steps = text, 0, steps

    def parse(self) -> Node:
        node = self._alternatives()
        if self._at < len(self._text):
            raise self._error()
        return node

    def _error(self) -> ValueError:
        return ValueError(
            f"the pattern {self._text!r} has {self._text[self._at :][:10]!r} where literals, '.', "
            "classes, groups, '|', repetition, '^' and '$' are understood"
        )

    def _alternatives(self) -> Node:
        branches = [self._sequence()]
        while self._text.startswith("|", self._at):
            self._at += 1
            branches.append(self._sequence())
        if len(branches) == 1:
            return branches[0]
        return lambda text, starts: {end for branch in branches for end in branch(text, starts)}

    def _sequence(self) -> Node:
        nodes: list[Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            nodes.append(self._repeated(self._single()))

        def find_ends(text: str, starts: set[int]) -> set[int]:
            for node in nodes:
                if not starts:
                    break
                self._steps.take(len(starts))
                starts = node(text, starts)
            return starts

        return find_ends

    def _single(self) -> Node:
        token = TOKEN.match(self._text, self._at)
        if not token:
            raise self._error()
        self._at = token.end()
        if token["group"]:
            inside = self._alternatives()
            if not self._text.startswith(")", self._at):
                raise self._error()
            self._at += 1
            return inside
        if token["edge"] == "^":
            return lambda _, starts: starts & {0}
        if token["edge"] == "$":
            return lambda text, starts: starts & {len(text)}
        letter = re.compile(token["one"] or re.escape(token["escaped"] or token["literal"]))
        return lambda text, starts: {i + 1 for i in starts if letter.match(text, i)}

    def _repeated(self, node: Node) -> Node:
        token = REPEAT.match(self._text, self._at)
        if not token:
            return node
        self._at = token.end()
        sign, exact, low, high = token.groups()
        least, maximum = SIGNS[sign] if sign else (int(exact or low or 0), int(exact or high or -1))
        limit = None if maximum == -1 else maximum
        if max(least, limit or 0) > MAX_REPEAT or (limit is not None and limit < least):
            raise ValueError(f"the pattern {self._text!r} repeats {token[0]}")
        return lambda text, starts: self._repeats(node, text, starts, least, limit)

    def _repeats(
        self, node: Node, text: str, starts: set[int], least: int, limit: int | None
    ) -> set[int]:
        for _ in range(least):
            self._steps.take(len(starts))
            starts = node(text, starts)
        reached, latest, left = set(starts), starts, None if limit is None else limit - least
        while latest and left != 0:
            self._steps.take(len(latest))
            latest = node(text, latest) - reached
            reached |= latest
            left = None if left is None else left - 1
        return reached
