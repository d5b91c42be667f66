"""Prompts as users write them: brackets, long texts, BREAK."""

import contextlib

import numpy as np
import pytest
from growth import LINEAR, growth

from sdrt.errors import UsageError
from sdrt.runtime.text.prompt_weighting import (
    apply_weights,
    chunks_from_prompt,
    parse_prompt_attention,
)
from sdrt.runtime.text.tokenizer import END, START, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return Tokenizer.from_folder(embedded / "tokenizer", 32)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red) circle", [("a ", 1.0), ("red", 1.1), (" circle", 1.0)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red : 0.5)", [("red ", 0.5)]),
        ("[blue]", [("blue", 1 / 1.1)]),
        ("((big))", [("big", 1.1 * 1.1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("(a [b:2] c)", [("a ", 1.1), ("b:2", 1.1 / 1.1), (" c", 1.1)]),
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1.0)]),
        ("a ) b ( c ] d [", [("a ) b ( c ] d [", 1.0)]),
        ("((a)", [("(", 1.0), ("a", 1.1)]),
        ("(a [b) c]", [("a [b", 1.1), (" c]", 1.0)]),
        ("a:1.3", [("a:1.3", 1.0)]),
        ("(1:2:1.5)", [("1:2", 1.5)]),
        ("(a:1e9)", [("a:1e9", 1.1)]),
        ("()", []),
        ("", []),
    ],
)
def test_brackets(prompt, parts):
    actual = list(parse_prompt_attention(prompt))
    assert [text for text, _ in actual] == [text for text, _ in parts]
    assert [weight for _, weight in actual] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("prompt", ["(a:99)", "(a:-1)"])
def test_an_absurd_weight_is_refused(prompt):
    with pytest.raises(UsageError, match="expected 0 to 10"):
        list(parse_prompt_attention(prompt))


def test_a_plain_prompt_is_the_tokenizers(tokenizer):
    prompt = "a red circle on a blue background"
    chunks = chunks_from_prompt(prompt, tokenizer)
    np.testing.assert_array_equal(chunks.ids, tokenizer([prompt]))
    assert (chunks.weights == 1.0).all()


def test_weights_stand_at_their_tokens(tokenizer):
    chunks = chunks_from_prompt("a (red:1.5) circle", tokenizer)
    at = np.flatnonzero(chunks.weights[0] != 1.0)
    assert chunks.ids[0, at].tolist() == tokenizer.ids("red")
    assert chunks.weights[0, at] == pytest.approx([1.5] * len(at))
    literal = chunks_from_prompt("a (red:1.5) circle", tokenizer, weighting=False)
    np.testing.assert_array_equal(literal.ids, tokenizer(["a (red:1.5) circle"]))


def test_long_prompts_go_on_in_another_chunk(tokenizer):
    ids = tokenizer.ids("red") * 70
    chunks = chunks_from_prompt("red " * 70, tokenizer)
    assert chunks.ids.shape == (-(-len(ids) // 30), 32)
    assert (chunks.ids[:, 0] == tokenizer.vocab[START]).all()
    inside = chunks.ids[:, 1:-1].ravel()
    assert inside[: len(ids)].tolist() == ids
    assert (inside[len(ids) :] == tokenizer.vocab[END]).all()


def test_break_begins_a_chunk(tokenizer):
    chunks = chunks_from_prompt("red BREAK blue", tokenizer)
    np.testing.assert_array_equal(chunks.ids, tokenizer(["red", "blue"]))
    assert len(chunks_from_prompt("BREAKFAST break", tokenizer)) == 1


def test_what_is_cut_is_quoted(tokenizer, caplog):
    chunks = chunks_from_prompt("red " * 30 + "green cross", tokenizer, chunking=False)
    assert chunks.ids.shape == (1, 32)
    assert "green cross" in caplog.text and "30 tokens" in caplog.text


def test_an_endless_prompt_is_refused(tokenizer):
    with pytest.raises(UsageError, match="at most 16"):
        chunks_from_prompt("red " * 1000, tokenizer)
    with pytest.raises(UsageError, match="characters"):
        chunks_from_prompt("(" * 10_000_000, tokenizer)


def test_weighing_keeps_the_mean():
    rng = np.random.default_rng(0)
    context = rng.normal(1.0, 1.0, (8, 16)).astype(np.float32)
    weights = np.ones(8, np.float32)
    assert apply_weights(context, weights) is context
    weights[3] = 1.5
    actual = apply_weights(context, weights)
    assert actual.mean() == pytest.approx(context.mean(), rel=1e-5)
    ratio = actual[3] / actual[2] * context[2] / context[3]
    np.testing.assert_allclose(ratio, 1.5, rtol=1e-4)


@pytest.mark.parametrize(
    "brackets",
    [lambda n: "(" * n + "a" + ")" * n, lambda n: "()" * n, lambda n: "([" * n + ")"],
    ids=["nested", "empty", "unclosed"],
)
def test_brackets_are_parsed_in_linear_time(brackets):
    def parse(count):
        with contextlib.suppress(UsageError):
            list(parse_prompt_attention(brackets(count)))

    assert growth(parse, 600) < LINEAR


def test_attention_has_a_bound_in_all():
    with pytest.raises(UsageError, match="more than 100"):
        list(parse_prompt_attention("((((a:10):10):10):10)"))
