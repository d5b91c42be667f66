"""The tokenizer against transformers' CLIPTokenizer, over CLIP's own 49,408 tokens."""

import pytest
from vocabulary import differences, of_another_unicode, prompts, tokenizers

AT_ONCE = 5000


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return tokenizers(tmp_path_factory.mktemp("vocabulary"))


def compared(both, count):
    """Differences that are ours, and how many are another Unicode's."""
    others = 0
    for seed in range(0, count, AT_ONCE):
        for actual in differences(*both, list(prompts(seed, AT_ONCE))):
            others += of_another_unicode(actual[0])
            if not of_another_unicode(actual[0]):
                return [actual], others
    return [], others


@pytest.mark.integration
@pytest.mark.reference
@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_prompts_have_the_references_ids(both, count):
    actual, others = compared(both, count)
    assert not actual
    assert others < 0.002 * count


@pytest.mark.reference
@pytest.mark.parametrize(
    "text",
    [
        "<|ENDOFTEXT|>\x1f)",
        "\u180e<|EndOfText|>",
        "..<|STARTOFTEXT|>'s",
        "<|endoftext|>'S<|ENDOFTEXT|>ing",
    ],
)
def test_special_tokens_in_capitals_are_text(both, text):
    assert not differences(*both, [text])
