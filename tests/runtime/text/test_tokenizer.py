"""The tokenizer against transformers' CLIPTokenizer, over the embedded model's vocabulary."""

import random

import pytest
from transformers import CLIPTokenizer

from sdrt.errors import BundleError, UsageError
from sdrt.runtime import Tokenizer

CASES = [
    "",
    " ",
    "a red circle on a blue background",
    "AN ORANGE Triangle,on a white background!!",
    "it's 3 o'clock, we're they'll I'd I've I'm don't",
    "naïve café ÀÉÎ straße ΣΑΣ ﬁ",
    "日本語 の 絵 😀😀 👩‍👩‍👧",
    "x²+½=¾ ⅷ 12345",
    "tabs\tand\nnew\r\nlines  and   spaces\u00a0here\u3000there",
    "<|startoftext|>hello<|endoftext|> world <|endoftext|",
    "e\u0301 combining \u0301\u0302 \u200b zero width",
    "red " * 100,
]


@pytest.fixture(scope="module")
def both(embedded):
    folder = embedded / "tokenizer"
    reference = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>"
    )
    return Tokenizer.from_folder(folder, 32), reference


def target(reference, texts):
    padded = reference(texts, padding="max_length", max_length=32, truncation=True)
    return padded["input_ids"]


@pytest.mark.reference
@pytest.mark.parametrize("text", CASES)
def test_ids_are_the_references(both, text):
    own, reference = both
    assert own([text]).tolist() == target(reference, [text])


@pytest.mark.reference
def test_random_text_has_the_references_ids(both):
    own, reference = both
    rng = random.Random(0)
    pieces = [
        "red",
        "blue circle",
        "'s",
        "'",
        "é",
        "Ω",
        "7",
        "٣",
        "!",
        "…",
        "\u2028",
        "中",
        "\U0001f600",
    ]
    pieces += [" ", "\t", "A", "ß", "İ", "ǅ", "\x85", "\x1f", "-", "<|endoftext|>", "½", "\u0300"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(2000)]
    actual, expected = own(texts).tolist(), target(reference, texts)
    wrong = [t for t, a, b in zip(texts, actual, expected, strict=True) if a != b]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "message"), [("a" * 10_000_000, "10,000,000 characters"), ("a\ud800b", "surrogate")]
)
def test_bad_text_is_refused(both, text, message):
    with pytest.raises(UsageError, match=message):
        both[0]([text])


def test_merges_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(BundleError, match="'a b'"):
        Tokenizer.from_folder(tmp_path, 8)
