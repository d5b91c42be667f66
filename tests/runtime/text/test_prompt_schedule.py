"""Prompts that change during a run: A1111's published examples, and others by its grammar."""

import pytest
from growth import LINEAR, growth

from sdrt.errors import UsageError
from sdrt.runtime.prompt_timeline import build_prompt_timeline
from sdrt.runtime.text.prompt_schedule import (
    parse_prompt_schedule,
    refuse_single_weight,
    split_prompts,
)


def schedule(prompt, steps, first_pass_steps=None):
    parsed = parse_prompt_schedule(prompt, steps, first_pass_steps)
    return list(zip(parsed.last_steps, parsed.texts, strict=True))


def turns(steps, *texts):
    return [(step, texts[(step - 1) % len(texts)]) for step in range(1, steps + 1)]


PUBLISHED = {  # at 10 steps
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": turns(10, "a", "(b:1.1)"),
    "[fe|]male": turns(10, "female", "male"),
    "[fe|||]male": turns(10, "female", "male", "male", "male"),
}


@pytest.mark.parametrize("prompt", PUBLISHED)
def test_published_examples(prompt):
    assert schedule(prompt, 10) == PUBLISHED[prompt]


def test_a_bar_next_to_a_colon_is_text():
    # A1111 publishes this as one that it does not handle, with a text of a time before `|` was
    # syntax; its grammar has no rule for this bracket.
    assert schedule("a [{b|d{:.5] c", 10) == [(10, "a [{b|d{:.5] c")]


def test_a_change_next_to_stray_brackets_is_read():
    # A1111's parser decides this by the order of a set, which differs from run to run.
    assert schedule("[a:b:3])[c", 10) == [(3, "a)[c"), (10, "b)[c")]


def test_the_published_landscape():
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
        "[ in foreground::0.6][: in background:0.25] [shoddy:masterful:0.5]"
    )
    start = "fantasy landscape with a"
    assert schedule(prompt, 100) == [
        (25, f"{start} mountain and an oak in foreground shoddy"),
        (50, f"{start} lake and an oak in foreground in background shoddy"),
        (60, f"{start} lake and an oak in foreground in background masterful"),
        (75, f"{start} lake and an oak in background masterful"),
        (100, f"{start} lake and a christmas tree in background masterful"),
    ]


# At 5 steps. What changes, nested and within weights; escapes; white space; odd numbers.
CHANGES = {
    "[:a:3]": [(3, ""), (5, "a")],
    "[a::3]": [(3, "a"), (5, "")],
    "[::3]": [(3, ""), (5, "")],
    "[:3]": [(3, ""), (5, "")],
    "[a:b:2][c:d:4]": [(2, "ac"), (4, "bc"), (5, "bd")],
    "[a:b:2] :": [(2, "a :"), (5, "b :")],
    "[a:(b:1.3):4]": [(4, "a"), (5, "(b:1.3)")],
    "[a:((b):c):2]": [(2, "a"), (5, "((b):c)")],
    "(a [b:c:2] d:1.2)": [(2, "(a b d:1.2)"), (5, "(a c d:1.2)")],
    "((([a:b:2])))": [(2, "(((a)))"), (5, "(((b)))")],
    "([a|b])": turns(5, "(a)", "(b)"),
    "[a|b|c]": turns(5, "a", "b", "c"),
    "[|a]": turns(5, "", "a"),
    "[a||b]": turns(5, "a", "", "b"),
    "[[a|b]|c]": turns(5, "a", "c"),
    "[[a|b]:c:2]": [(1, "a"), (2, "b"), (3, "c"), (4, "c"), (5, "c")],
    "[a:[b|c]:2]": [(1, "a"), (2, "a"), (3, "b"), (4, "c"), (5, "b")],
    "[a|[b:c:3]]": [(1, "a"), (2, "b"), (3, "a"), (4, "c"), (5, "a")],
    "[[a:b:1]:[c:d:4]:3]": [(1, "a"), (3, "b"), (4, "c"), (5, "d")],
    r"a \[b:c:3\] [d:e:2]": [(2, r"a \[b:c:3\] d"), (5, r"a \[b:c:3\] e")],
    r"\\[a:b:2]": [(2, r"\\a"), (5, r"\\b")],
    r"[a\:b:2]": [(2, ""), (5, r"a\:b")],
    r"[a\|b|c]": turns(5, r"a\|b", "c"),
    "[a:b: 3 ]": [(3, "a"), (5, "b")],
    "[a: b :\t2]": [(2, "a"), (5, " b ")],
    "[a\n:\nb:2]": [(2, "a\n"), (5, "\nb")],
    "[a:b:+3]": [(3, "a"), (5, "b")],
    "[a:b:3e0]": [(3, "a"), (5, "b")],
    "[a:b:.99]": [(4, "a"), (5, "b")],
    "[a:b:0.05]": [(5, "b")],
    "[a:b:0]": [(5, "b")],
    "[a:b:-2]": [(5, "b")],
    "[a:b:12]": [(5, "a")],
    "[a:b:1.0]": [(5, "a")],
    "[a:b:5.]": [(5, "a")],
    "[a:b:1e1]": [(5, "a")],
    "[a:b:1e999]": [(5, "a")],
    "a]b[c:2]": [(2, "a]b"), (5, "a]bc")],
    "[a:[b:2]": [(2, "[a:"), (5, "[a:b")],
    "(a:b:c) [d:1]": [(1, "(a:b:c) "), (5, "(a:b:c) d")],
    "[[a:b:c:d]:2] [x:y:1]": [(1, "[[a:b:c:d]:2] x"), (5, "[[a:b:c:d]:2] y")],
    "(a:[b:3]:c:d)": [(3, "(a::c:d)"), (5, "(a:b:c:d)")],
}
LITERAL = [
    *("", "  ", "[3]", "(a)", "[a]", "(a:1.2)", "a:3", "[a:b:3", "a:b:3]", "[(a]:b:3)"),
    *("[a:b:c:3]", "[a:[b:c:d:2]:5]", "[a:b:3 4]", "[a:b:three]", "[a:b:\u0663]", "(a [b:3)"),
    # A bar outside of brackets, or a backslash with nothing to escape, and all is text.
    *("a | b [c:3]", "[a|b:c]", "[a:b|c:3]", "(a|b)", "a\\", "x [a:b:2] \\", "[a:b:2] \\\n"),
]


@pytest.mark.parametrize("prompt", CHANGES)
def test_changes(prompt):
    assert schedule(prompt, 5) == CHANGES[prompt]


@pytest.mark.parametrize("prompt", LITERAL)
def test_what_is_no_change_is_text(prompt):
    assert schedule(prompt, 5) == [(5, prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("[a:b:5]", [(4, "b")]),
        ("[a:b:12]", [(2, "a"), (4, "b")]),
        ("[a:b:14]", [(4, "a")]),
        ("[a:b:.5]", [(4, "b")]),
        ("[a:b:1.0]", [(4, "b")]),
        ("[a:b:1.5]", [(2, "a"), (4, "b")]),
        ("[a:b:2.5]", [(4, "a")]),
        ("[a|b]", turns(4, "a", "b")),
    ],
)
def test_a_second_pass_counts_on(prompt, expected):
    assert schedule(prompt, 4, 10) == expected


def test_a_change_comes_one_evaluation_after_its_step():
    parsed = parse_prompt_schedule("[a:b:2]", 5)
    assert [parsed.text_at(k) for k in range(7)] == ["a", "a", "a", "b", "b", "b", "b"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("meet at 10:30", [("meet at 10:30", 1.0)]),
        ("a AND b", [("a", 1.0), (" b", 1.0)]),
        ("a :1.2 AND b: -.5 ", [("a", 1.2), (" b", -0.5)]),
        ("a:2. AND (b:0.5)", [("a", 2.0), (" (b:0.5)", 1.0)]),
        ("a AND [b:c:3]:0.25", [("a", 1.0), (" [b:c:3]", 0.25)]),
        ("AND", [("", 1.0), ("", 1.0)]),
        ("SAND and ANDROID", [("SAND and ANDROID", 1.0)]),
        ("a:1e3 AND b:c", [("a:1e3", 1.0), (" b:c", 1.0)]),
    ],
)
def test_prompts_are_split_at_and(prompt, expected):
    assert split_prompts(prompt) == expected


def test_a_weight_of_a_single_prompt_is_refused_where_it_would_count():
    for prompt in ("a cat", "a:1.0", "a:2 AND b:3", "(a:2)", "a:b"):
        refuse_single_weight(prompt)
    with pytest.raises(UsageError, match="by 30"):
        refuse_single_weight("meet at 10:30 ")


def test_what_is_beyond_bounds_is_refused():
    with pytest.raises(UsageError, match="at most 16"):
        split_prompts(" AND ".join("abcdefghijklmnopq"))
    with pytest.raises(UsageError, match="expected -100 to 100"):
        split_prompts("a:1000 AND b")
    with pytest.raises(UsageError, match="nests more than"):
        parse_prompt_schedule("[" * 100 + "a" + ":3]" * 100, 5)
    with pytest.raises(UsageError, match="different texts"):
        build_prompt_timeline("[" + "|".join(map(str, range(300))) + "]", "", 300, 300)


@pytest.mark.parametrize("piece", ["[", "[a:", "[a|b]", "(", "]:", "a:b:3]"])
def test_long_prompts_are_parsed_in_linear_time(piece):
    assert growth(lambda count: parse_prompt_schedule(piece * count, 5), 500) < LINEAR


def test_deep_brackets_are_parsed_in_linear_time():
    def parse(count):
        parse_prompt_schedule("[a|b]" + "(" * count + "[a:3]" + ")" * count, 5)

    assert growth(parse, 500) < LINEAR


def test_a_timeline_is_of_the_runs_evaluations():
    timeline = build_prompt_timeline("[a|b] c AND [d:e:1]:0.5", "[f:g:.5]", 4, 4)
    assert timeline.prompts == (("a c", "a c", "b c", "a c"), (" d", " d", " e", " e"))
    assert timeline.negative == ("f", "f", "f", "g") and timeline.weights == (1.0, 0.5)
    assert timeline.changes == (False, False, True, True) and not timeline.is_plain
    literal = build_prompt_timeline("[a|b] AND c", "", 2, 2, weighting=False)
    assert literal.prompts == (("[a|b] AND c",) * 2,) and literal.is_plain
