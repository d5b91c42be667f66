"""PEFT's patterns of module names: matched as PEFT does, and never for long."""

import random
import re

import pytest
from peft.utils.other import get_pattern_key

from sdrt.runtime.lora import patterns
from sdrt.runtime.lora.patterns import Patterns

ATOMS = ("a", "b", ".", r"\.", "_", "[ab]", "[^a]", r"\d", r"\w", "to_q", "(a|b)", "(?:ab|b)")
ATOMS = (*ATOMS, "(a*b)", "(a*)*b", "^", "$", "1", "0")
REPEATS = ("", "", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "*?", "{1,}")


def test_a_pattern_matches_what_pefts_does():
    rng, matched = random.Random(0), 0
    for _ in range(3000):
        pattern = "".join(rng.choice(ATOMS) + rng.choice(REPEATS) for _ in range(rng.randint(1, 5)))
        pattern += rng.choice(["", "", "|" + rng.choice(ATOMS)])
        name = "".join(rng.choice(["a", "b", "to_q", ".", "0"]) for _ in range(rng.randint(1, 8)))
        try:
            re.compile(pattern)
        except re.error:
            continue
        actual = Patterns({pattern: 1.0}).get(name, None) is not None
        assert actual == (get_pattern_key([pattern], name) == pattern), (pattern, name)
        matched += actual
    assert matched > 300


def test_the_first_pattern_that_matches_counts():
    values = {"down_blocks.*to_q": 1.0, "to_q": 2.0, "attn[12].to_(k|v)": 3.0}
    known = Patterns(values)
    for name in ("down_blocks.0.attn1.to_q", "up_blocks.0.attn1.to_q", "a.attn2.to_v", "a.xto_q"):
        assert known.get(name, 4.0) == values.get(get_pattern_key(values, name), 4.0)


@pytest.mark.parametrize(
    "pattern",
    ["(?=x)", r"\bx", "(?i)a", "(?P<n>a)", r"(a)\1", "a**", "(a", "a)", "[", "[[a]", "a{2000}"]
    + ["a{3,2}", "*a", "(" * 21 + "a" + ")" * 21, "a" * 257],
)
def test_patterns_that_are_not_understood(pattern):
    with pytest.raises(ValueError, match="pattern"):
        Patterns({pattern: 1.0})


@pytest.mark.parametrize("pattern", ["(a+)+x", "(((a*)*)*)*x", ".*.*.*.*.*.*.*.*x", "(a|a)*x"])
def test_patterns_that_would_take_years_do_not(pattern):
    assert Patterns({pattern: 1.0}).get("a" * 200, None) is None


def test_patterns_that_take_too_long(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_STEPS", 1000)
    with pytest.raises(ValueError, match="too long"):
        Patterns({".*.*.*.*.*.*x": 1.0}).get("a." * 200, None)
