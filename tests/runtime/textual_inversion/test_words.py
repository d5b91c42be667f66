"""Token ids of prompts with words of textual inversion, against transformers and diffusers."""

import random

import numpy as np
import pytest

from sdrt.errors import CheckpointError
from sdrt.runtime import Tokenizer
from sdrt.runtime.text.prompt_weighting import chunks_from_prompt
from sdrt.runtime.text.tokenizer import FIRST_WORD_ID
from sdrt.runtime.textual_inversion.words import Embedding, EmbeddingSet, check_words

# In lower case: of others diffusers uses only the first vector.
COUNTS = {"<zorb>": 3, "<cat-toy>": 2, "blim.": 1, "<zo": 1, "two words!": 2}
SPLICES = ["a", "red", "circle", "zorb", "<zorb>", "<zorb>_1", ",", "(", ")", "é", ""]


def embedding(word, count=1, width=16):
    return Embedding(word, {"text_encoder": np.ones((count, width), np.float32)}, "0" * 64)


def words_of(tokenizer, counts):
    embeddings = tuple(embedding(word, count) for word, count in counts.items())
    return EmbeddingSet({"text_encoder": tokenizer}, embeddings)


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return Tokenizer.from_folder(embedded / "tokenizer", 32)


@pytest.mark.reference
def test_ids_are_those_of_transformers_and_diffusers(embedded, tokenizer):
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer.from_pretrained(str(embedded / "tokenizer"))
    base = len(reference)
    added = [e for word, n in COUNTS.items() for e in embedding(word, n).names]
    for word in added:
        reference.add_tokens(word)
    own = words_of(tokenizer, COUNTS).by_encoder["text_encoder"].tokenizer
    rng = random.Random(0)
    convert = TextualInversionLoaderMixin().maybe_convert_prompt
    with_words = 0
    for _ in range(300):
        parts = rng.choices([*SPLICES, *COUNTS], k=rng.randint(1, 8))
        if "<zorb>" in parts:  # diffusers then replaces it within this one too
            parts = [part for part in parts if part != "<zorb>_1"]
        prompt = " ".join(parts)
        expected = reference(convert(prompt, reference)).input_ids[1:-1]
        expected = [i if i < base else i - base + FIRST_WORD_ID for i in expected]
        assert own.ids(prompt) == expected, prompt
        with_words += any(i >= FIRST_WORD_ID for i in expected)
    assert with_words > 150


def test_a_word_of_letters_is_not_found_within_another(tokenizer):
    own = words_of(tokenizer, {"easyneg": 2}).by_encoder["text_encoder"].tokenizer
    both = [FIRST_WORD_ID, FIRST_WORD_ID + 1]
    assert own.ids("EasyNeg, a circle")[:2] == both
    assert [i for i in own.ids("(easyneg:1.2)") if i >= FIRST_WORD_ID] == both
    assert max(own.ids("easynegative uneasyneg")) < FIRST_WORD_ID


def test_every_vector_of_a_word_has_its_weight(tokenizer):
    own = words_of(tokenizer, {"<zorb>": 3}).by_encoder["text_encoder"].tokenizer
    chunks = chunks_from_prompt("a (<zorb>:1.3) circle", own)
    is_word = chunks.ids[0] >= FIRST_WORD_ID
    assert is_word.sum() == 3
    assert np.allclose(chunks.weights[0], np.where(is_word, 1.3, 1.0))


def test_a_word_is_not_cut_apart_between_chunks(tokenizer):
    own = words_of(tokenizer, {"<zorb>": 5}).by_encoder["text_encoder"].tokenizer
    chunks = chunks_from_prompt("red " * 28 + "<zorb> circle", own)
    assert (chunks.ids >= FIRST_WORD_ID).sum(axis=1).tolist() == [0, 5]
    longer = words_of(tokenizer, {"<zorb>": 40}).by_encoder["text_encoder"].tokenizer
    assert (chunks_from_prompt("<zorb>", longer).ids >= FIRST_WORD_ID).sum() == 40


def test_the_words_that_a_text_has_are_found(tokenizer):
    words = words_of(tokenizer, {"<zorb>": 2, "easyneg": 1, "<blim>": 3})
    used = words.find_used(["a (<blim>:1.1)", "easyneg"])
    assert [embedding.word for embedding in used] == ["easyneg", "<blim>"]


def test_a_word_of_the_folder_gives_way_to_one_that_was_loaded(tokenizer):
    listed, loaded = embedding("<zorb>", 4), embedding("<ZORB>", 2)
    words = EmbeddingSet({"text_encoder": tokenizer}, (loaded,), (), (listed, embedding("<b>")))
    assert [entry.num_vectors for entry in words.embeddings] == [2, 1]


@pytest.mark.parametrize(
    "words",
    [["circle"], ["RED"], ["<|endoftext|>"], ["<a>", "<A>"], ["<a>_1", "<a>"]],
)
def test_words_that_collide_are_refused_by_name(tokenizer, words):
    embeddings = [embedding(word, 2) for word in words]
    with pytest.raises(CheckpointError) as caught:
        check_words(embeddings, {"text_encoder": tokenizer})
    assert words[-1].lower() in caught.value.message.lower()
    assert "another word" in caught.value.hint
