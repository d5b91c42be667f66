"""Tokenizers as today's libraries save them: the ids that sdrt reads are transformers' own."""

import json
import random
import shutil

import pytest
from tokenizers import AddedToken
from transformers import CLIPTokenizer

from sdrt.errors import BundleError, CheckpointError, UsageError
from sdrt.export.tokenizer import read_tokenizer
from sdrt.runtime import Tokenizer
from sdrt.runtime.text.prompt_weighting import chunks_from_prompt

LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
OLD = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
WORDS = [
    "<zorb>",
    "<zorb>-1",
    "<zo",
    "<Mixed-Case>",
    "<mixed-case>x",
    "two words",
    "naïve",
    "(round)",
    "[square]",
    "a:1.5",
    "<BREAK>",
    "\\(back",
    "日本",
    "ΣΑΣ",
    "İst",
    "x\u0301",
    AddedToken("<exact>", normalized=False),
    AddedToken("Exact", normalized=False),
    AddedToken("blim", single_word=True),
    AddedToken("_under", single_word=True, normalized=False),
    AddedToken("left", lstrip=True),
    AddedToken("right", rstrip=True, normalized=False),
    AddedToken("both", lstrip=True, rstrip=True),
    AddedToken("<special>", special=True, normalized=False),
    AddedToken("<SPECIAL>", special=True, normalized=True),
    AddedToken(" spaced ", normalized=False),
    AddedToken("\u3000", normalized=False, lstrip=True),
]
PLAIN = [
    "red",
    "a",
    "circle",
    "it's",
    "x²",
    "é",
    "e\u0301",
    "7",
    "日",
    "😀",
    "ß",
    "_",
    "\u200d",
    "Ⓐ",
]
PUNCTUATION = [*"()[]<>:,.!_-'\\|", " ", "  ", "\t", "\u3000", "\x1f", "\x85", ""]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, embedded):
    """The embedded tokenizer with added words, as the installed transformers saves it."""
    tokenizer = CLIPTokenizer.from_pretrained(str(embedded / "tokenizer"))
    tokenizer.add_tokens(WORDS)
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    tokenizer.save_pretrained(str(folder))
    return folder


def prompts(count, words=WORDS):
    rng = random.Random(0)
    added = [str(word.content if isinstance(word, AddedToken) else word) for word in words]
    for _ in range(count):
        pieces = []
        for _ in range(rng.randint(1, 8)):
            word = rng.choice([rng.choice(added), rng.choice(added), rng.choice(PLAIN), END])
            word = rng.choice([word, word, word.upper(), word.lower(), word.title()])
            pieces += [word, rng.choice(PUNCTUATION)]
        yield "".join(pieces)


def pair(source, target):
    """sdrt's tokenizer by way of a bundle's files, and transformers' own."""
    read_tokenizer(source).write(target)
    return Tokenizer.from_folder(target, LENGTH), CLIPTokenizer.from_pretrained(str(source))


def check_same(own, reference, texts):
    expected = reference(texts, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    actual = own(texts).tolist()
    wrong = [(t, a, b) for t, a, b in zip(texts, actual, expected, strict=True) if a != b]
    assert not wrong, (
        f"{len(wrong)} of {len(texts)} differ, e.g. {min(wrong, key=lambda w: len(w[0]))}"
    )


@pytest.mark.reference
def test_added_words_have_the_references_ids(saved, tmp_path):
    assert not (saved / "vocab.json").exists()
    own, reference = pair(saved, tmp_path / "written")
    check_same(own, reference, list(prompts(3000)))


@pytest.mark.reference
def test_a_tokenizer_saved_after_its_use_is_the_same(saved, tmp_path):
    """What it was last asked for, to pad and to cut, is in its file."""
    used = CLIPTokenizer.from_pretrained(str(saved))
    used(["a", "red " * 40], padding="max_length", max_length=16, truncation=True)
    used.save_pretrained(str(tmp_path / "read"))
    assert json.loads((tmp_path / "read" / "tokenizer.json").read_text())["padding"]
    own, reference = pair(tmp_path / "read", tmp_path / "written")
    check_same(own, reference, list(prompts(100)))


def test_padding_in_front_in_tokenizer_json_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "read")
    path = tmp_path / "read" / "tokenizer.json"
    content = json.loads(path.read_text())
    padding = {"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 607, "pad_type_id": 0, "pad_token": END}
    path.write_text(json.dumps({**content, "padding": padding}))
    with pytest.raises(CheckpointError, match="padding_side is 'left'"):
        read_tokenizer(tmp_path / "read")


def variant(embedded, folder, **files):
    """The embedded tokenizer's folder with other files in it; None takes one away."""
    shutil.copytree(embedded / "tokenizer", folder)
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
    return folder


def token(content, **flags):
    return {"content": content, **OLD, **flags}


ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
VARIANTS = {
    "nothing but vocabulary and merges": {"tokenizer_config": None, "special_tokens_map": None},
    "padded with a mark": {
        "tokenizer_config": {**ROLES, "pad_token": "!"},
        "special_tokens_map": {**ROLES, "pad_token": "!"},
    },
    "the files disagree on the padding": {
        "tokenizer_config": {**ROLES, "pad_token": "!"},
        "special_tokens_map": ROLES,
    },
    "special tokens of transformers 4": {
        "tokenizer_config": {**ROLES, "bos_token": {"__type": "AddedToken", **token(START)}},
        "special_tokens_map": {**ROLES, "bos_token": token(START), "eos_token": token(END)},
    },
    "added_tokens.json": {"added_tokens": {"<zorb>": 609, "<Other>": 608, "[x]": 610}},
    "added_tokens.json with other ids": {"added_tokens": {"<zorb>": 900, "<other>": 700}},
    "added_tokens_decoder": {
        "tokenizer_config": {
            **ROLES,
            "added_tokens_decoder": {
                "606": token(START, normalized=False, special=True),
                "607": token(END, normalized=False, special=True),
                "608": token("<Zorb>", lstrip=True),
                "609": token("blim", single_word=True, rstrip=True, normalized=False),
            },
        }
    },
    "the decoder and added_tokens.json disagree": {
        "tokenizer_config": {**ROLES, "added_tokens_decoder": {"608": token("<zorb>")}},
        "added_tokens": {"<other>": 608, "<zorb>": 609},
    },
    "additional special tokens": {
        "tokenizer_config": {**ROLES, "additional_special_tokens": ["<zorb>", "Blim"]},
        "special_tokens_map": ROLES,
    },
    "other first and last tokens": {
        "tokenizer_config": {**ROLES, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>"},
        "special_tokens_map": None,
    },
    "settings that change nothing": {
        "tokenizer_config": {**ROLES, "do_lower_case": False, "add_prefix_space": True, "x": [1]}
    },
}


@pytest.mark.reference
@pytest.mark.parametrize("files", VARIANTS.values(), ids=VARIANTS)
def test_files_of_all_kinds_have_the_references_ids(embedded, tmp_path, files):
    own, reference = pair(variant(embedded, tmp_path / "read", **files), tmp_path / "written")
    words = ["<zorb>", "<Zorb>", "<other>", "[x]", "blim", "!", "!!!", "<s>", START, "<p>"]
    check_same(own, reference, list(prompts(300, words)))
    assert len(own.vocab.keys() | own.added._ids.keys()) == len(reference)


REFUSED = {
    "another class": ({"tokenizer_class": "T5TokenizerFast"}, "T5TokenizerFast"),
    "padding in front": ({"padding_side": "left"}, "padding_side='left'"),
    "cut in front": ({"truncation_side": "left"}, "truncation_side='left'"),
    "special tokens as text": ({"split_special_tokens": True}, "split_special_tokens=True"),
    "a token of no kind": ({"pad_token": 7}, "pad_token"),
    "added tokens of no kind": (
        {"added_tokens_decoder": {"608": "<zorb>"}},
        "added_tokens_decoder",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_change_ids_are_refused_by_name(embedded, tmp_path, config, message):
    files = {"tokenizer_config": {**ROLES, **config}, "special_tokens_map": None}
    folder = variant(embedded, tmp_path / "read", **files)
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(folder)


def test_another_class_in_the_index_is_refused(embedded):
    with pytest.raises(CheckpointError, match="'T5Tokenizer'"):
        read_tokenizer(embedded / "tokenizer", "T5Tokenizer")


BROKEN = ["{", "[]", "{}", '{"model": {"type": "WordPiece"}}', '{"model": {"type": "BPE"}}']


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_tokenizer_json_is_refused(embedded, tmp_path, content):
    folder = variant(embedded, tmp_path / "read")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer"):
        read_tokenizer(folder)


def test_files_elsewhere_are_not_read(embedded, tmp_path):
    names = {"gguf_file": str(tmp_path / "weights.gguf"), "tokenizer_object": 7, "merges": 7}
    folder = variant(embedded, tmp_path / "read", tokenizer_config={**ROLES, **names})
    assert read_tokenizer(folder).vocab == read_tokenizer(embedded / "tokenizer").vocab


@pytest.mark.reference
def test_a_word_of_several_vectors_is_read_as_the_pipelines_do(saved, tmp_path):
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    reference = CLIPTokenizer.from_pretrained(str(saved))
    reference.add_tokens(["<zorb>_1", "<zorb>_2", "<zorb>_4"])
    reference.save_pretrained(str(tmp_path / "read"))
    own, _ = pair(tmp_path / "read", tmp_path / "written")
    convert = TextualInversionLoaderMixin().maybe_convert_prompt
    for prompt in ("a <zorb>, red", "<ZORB> and <zorb>", "<zorb><zorb>", "a <zorb>_1", "(<zorb>)"):
        expected = reference(convert(prompt, reference), add_special_tokens=False).input_ids
        assert own.ids(prompt) == expected, prompt


@pytest.mark.parametrize(
    ("prompt", "word", "weight"),
    [
        ("a (round) b", "(round)", 1.0),
        ("a ((round)) b", "(round)", 1.1),
        ("a ((ROUND):1.5) b", "(round)", 1.5),
        (r"a \(round\) b", "(round)", 1.0),
        ("[[square]]", "[square]", 1 / 1.1),
        ("(a:1.5)", "a:1.5", 1.1),
        ("(a:1.5:1.3)", "a:1.5", 1.3),
        ("(<zo:1.4)", "<zo", 1.4),
        ("red <BREAK> blue", "<BREAK>", 1.0),
        ("red <break> blue", "<BREAK>", 1.0),
        (r"(\(back:0.5)", r"\(back", 0.5),
    ],
)
def test_added_words_survive_the_syntax_of_prompts(saved, tmp_path, prompt, word, weight):
    read_tokenizer(saved).write(tmp_path / "written")
    own = Tokenizer.from_folder(tmp_path / "written", LENGTH)
    chunks = chunks_from_prompt(prompt, own)
    assert len(chunks) == 1
    at = chunks.ids[0].tolist().index(own.added._ids[word])
    assert chunks.weights[0, at] == pytest.approx(weight)


def test_break_between_added_words_still_begins_a_chunk(saved, tmp_path):
    read_tokenizer(saved).write(tmp_path / "written")
    own = Tokenizer.from_folder(tmp_path / "written", LENGTH)
    assert len(chunks_from_prompt("<BREAK> BREAK (round) BREAK blue", own)) == 3


STRANGE = {
    "no object": ([], "added_tokens"),
    "an id that is none": ({"-1": token("x")}, "an id"),
    "an unknown flag": ({"608": {**token("x"), "regex": True}}, "regex"),
    "no text": ({"608": token("")}, "content"),
    "an endless text": ({"608": token("x" * 300)}, "content"),
    "a word twice": ({"608": token("x"), "609": token("x")}, "twice"),
    "an id twice": ({"5": token("<x>")}, "two ids"),
    "a hole": ({"700": token("<x>")}, "expected the ids 0"),
}


@pytest.mark.parametrize(("added", "message"), STRANGE.values(), ids=STRANGE)
def test_added_tokens_of_a_bundle_that_do_not_hold(embedded, tmp_path, added, message):
    folder = variant(embedded, tmp_path / "x", tokenizer_config={"added_tokens_decoder": added})
    with pytest.raises(BundleError, match=message):
        Tokenizer.from_folder(folder, LENGTH)


def test_vectors_that_make_a_prompt_endless_are_refused(embedded, tmp_path):
    names = ["é_", *(f"é__{i}" for i in range(1, 400))]
    added = {str(608 + i): token(name) for i, name in enumerate(names)}
    folder = variant(embedded, tmp_path / "x", tokenizer_config={"added_tokens_decoder": added})
    with pytest.raises(UsageError, match="vectors of 'é_'"):
        Tokenizer.from_folder(folder, LENGTH).ids("é_ " * 3000)
