"""LoRA tags in prompts, as the AUTOMATIC1111 web UI reads them."""

import contextlib
import re

import pytest

from sdrt.errors import UsageError
from sdrt.runtime.lora.tags import LoraTag, LoraWeight, check_untagged, parse_tags

# The web UI's own expression; what it does not match is text there and here.
WEB_UI = re.compile(r"<(\w+):([^>]+)>")


def tags(prompt):
    return [(tag.name, tag.weight.text_encoder, tag.weight.unet) for tag in parse_tags(prompt)[1]]


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:style>", ("style", 1.0, 1.0)),
        ("<lora:style:0.8>", ("style", 0.8, 0.8)),
        ("<lora:style:-1>", ("style", -1.0, -1.0)),
        ("<lora:style: .5 >", ("style", 0.5, 0.5)),
        ("<lora:style:1e-1>", ("style", 0.1, 0.1)),
        ("<lora:style:0.8:0.5>", ("style", 0.8, 0.5)),
        ("<lora:style:te=0.8>", ("style", 0.8, 0.8)),
        ("<lora:style:unet=0.5>", ("style", 1.0, 0.5)),
        ("<lora:style:0.7:te=0.8:unet=0.5>", ("style", 0.8, 0.5)),
        ("<lora:style:unet=0.5:0.7>", ("style", 0.7, 0.5)),
        ("<lyco:style:0.8>", ("style", 0.8, 0.8)),
        ("<lora:folder/my style v1.5 (final)=x:2>", ("folder/my style v1.5 (final)=x", 2.0, 2.0)),
        ("<lora:\u00fcbung:1>", ("\u00fcbung", 1.0, 1.0)),
    ],
)
def test_a_tag(tag, expected):
    assert tags(tag) == [expected]
    assert parse_tags(tag)[0] == ""


@pytest.mark.parametrize(
    "prompt",
    [
        *("I <3 you", "a <b> c", "<lora>", "<lora:>", "< lora:x:1>", "<lora :x>", "lora:x:1"),
        *("<lora:x", "<lora:x:1", "x:1>", "1 < 2 and 3 > 2", "<>", "<:x>", "(a:1.2) [b]", ""),
    ],
)
def test_what_is_not_a_tag_is_text(prompt):
    assert not WEB_UI.search(prompt)
    assert parse_tags(prompt) == (prompt, ())
    check_untagged(prompt, "negative prompt", "leave it out")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a <lora:x:1> b", "a  b"),
        ("a<lora:x:1>b", "ab"),
        ("(a <lora:x:1> b:1.2)", "(a  b:1.2)"),
        ("\n<lora:x:1>\n a, <lyco:y:1>", "\n\n a, "),
        ("<lo<lora:x:1>ra:y:1>", "<lora:y:1>"),
        ("a <3 <lora:x:1> > b", "a <3  > b"),
    ],
)
def test_the_text_that_remains(prompt, text):
    assert parse_tags(prompt)[0] == text == WEB_UI.sub("", prompt)


def test_tags_keep_their_order_and_come_more_than_once():
    assert tags("<lora:b:1> <lora:a:0.5> x <lora:b:0.25>") == [
        ("b", 1.0, 1.0),
        ("a", 0.5, 0.5),
        ("b", 0.25, 0.25),
    ]


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<hypernet:x:1>", "kind 'hypernet'"),
        ("<LORA:x:1>", "kind 'LORA'"),
        ("<note:hello>", "kind 'note'"),
        ("<lora::1>", "has no name"),
        ("<lora: :1>", "has no name"),
        ("<lora:x:>", "not a number"),
        ("<lora:x:strong>", "not a number"),
        ("<lora:x:0,8>", "not a number"),
        ("<lora:x:te=>", "not a number"),
        ("<lora:x:nan>", "-10 to 10"),
        ("<lora:x:inf>", "-10 to 10"),
        ("<lora:x:11>", "-10 to 10"),
        ("<lora:x:1:-11>", "-10 to 10"),
        ("<lora:x:1:1:8>", "dyn"),
        ("<lora:x:1:dyn=8>", "'dyn'"),
        ("<lora:x:1:start=0.5>", "'start'"),
        ("<lora:<lora:x:1>", "not a number"),
    ],
)
def test_a_tag_that_is_not_understood_is_refused_by_name(tag, message):
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        parse_tags(f"a {tag} b")
    assert tag in str(raised.value)


@pytest.mark.parametrize("tag", ["<lora:x:1>", "<lyco:x>", "<hypernet:x:1>"])
def test_a_tag_where_none_is_applied(tag):
    with pytest.raises(UsageError, match=f"{tag} in the negative prompt (.|\\n)*hint: put it"):
        check_untagged(f"blurry {tag}", "negative prompt", "put it into the prompt")


@pytest.mark.parametrize(
    "weight",
    [LoraWeight(0.8, 0.8), LoraWeight(1.0, 0.5), LoraWeight(0.1 + 0.2, -1 / 3), LoraWeight(1e-9)],
)
def test_a_tag_is_written_as_it_is_read(weight):
    assert parse_tags(f"a {LoraTag('x', weight)}")[1] == (LoraTag("x", weight),)


@pytest.mark.parametrize("part", ["<lora:x", "<lora:", "<", "<lora:>", "<lora:x:1>", "w", "<a:>x:"])
def test_the_time_is_linear(part):
    """If it were quadratic, most of these would not end within an hour."""
    for end in ("", ">"):
        with contextlib.suppress(UsageError):
            parse_tags(part * (1_000_000 // len(part)) + end)
