"""The 49,408 tokens of CLIP, from the file that open_clip_torch carries; prompts of all kinds."""

import gzip
import hashlib
import html
import importlib.metadata
import json
import random
import sys
import unicodedata
from collections import defaultdict

import pytest
from tokenizers.normalizers import NFC
from transformers import CLIPTokenizer

from sdrt.runtime import Tokenizer
from sdrt.runtime.text.tokenizer import byte_letters

FILE = "open_clip/bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
TOKENS = 49_408


def tokenizers(folder):
    """sdrt's and the reference's over the whole vocabulary, which is written into the folder."""
    write_files(folder)
    reference = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return Tokenizer.from_folder(folder, 77), reference


def write_files(folder):
    try:
        path = importlib.metadata.distribution("open_clip_torch").locate_file(FILE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("CLIP's vocabulary: pip install --no-deps open_clip_torch")
    packed = path.read_bytes()
    assert hashlib.sha256(packed).hexdigest() == SHA256
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    merges = lines[1 : TOKENS - 2 * 256 - 2 + 1]
    letters = sorted(byte_letters(), key=lambda letter: (ord(letter) > 255, ord(letter)))
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == TOKENS
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


WORDS = (
    *("a", "photo", "of", "an", "astronaut", "riding", "horse", "masterpiece", "8k", "trending"),
    *("artstation", "ULTRA-detailed", "Greg", "Rutkowski", "it's", "don't", "we'LL", "I'D", "'tis"),
    *("rock'n'roll", "f/1.8", "50mm", "#art", "@user", "C++", "x2", "1girl", "café", "naïve", "ﬁ"),
    *(
        "straße",
        "ΣΊΣΥΦΟΣ",
        "İstanbul",
        "ĲSSEL",
        "ǅ",
        "日本語",
        "東京タワー",
        "한국어",
        "ไทย",
        "हिन्दी",
    ),
    *(
        "مرحبا",
        "שלום",
        "Ελλάδα",
        "Москва",
        "😀",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "1️⃣",
        "½",
        "Ⅷ",
        "²",
        "٣",
        "&amp;",
        "&lt;b&gt;",
    ),
    *("&#39;s", "<|startoftext|>", "<|endoftext|>", "<|endoftext", "e\u0301", "\u0301", "\u200b"),
)
SPACES = (
    *"     \t\n\r\x0b\x0c\x1c\x1f\x85\xa0",
    *"\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u180e",
    "",
)
MARKS = (
    *"',.!?:;()[]{}<>|\\/-_+=*&^%$#@~`\"",
    "...",
    "--",
    "'s",
    "'S",
    "'re",
    "'''",
    "</w>",
    "''ll",
)


def by_category():
    """Every assigned letter of Unicode, by its category."""
    actual = defaultdict(list)
    for code in range(sys.maxunicode + 1):
        if (kind := unicodedata.category(chr(code))) not in ("Cn", "Cs", "Co"):
            actual[kind].append(chr(code))
    return list(actual.values())


def prompts(seed, count):
    """Prompts as people write them, and mixtures of all that Unicode has."""
    rng, categories = random.Random(seed), by_category()
    parts = (
        lambda: rng.choice(WORDS),
        lambda: rng.choice(WORDS).upper(),
        lambda: rng.choice(MARKS),
        lambda: "".join(rng.choices(rng.choice(categories), k=rng.randint(1, 4))),
        lambda: chr(rng.randrange(0x20, 0x250)),
        lambda: str(rng.randrange(10 ** rng.randint(1, 9))),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 30))),
        lambda: html.escape(rng.choice(WORDS)),
    )
    for _ in range(count):
        pieces = (rng.choice(parts)() + rng.choice(SPACES) for _ in range(rng.randint(0, 12)))
        yield "".join(pieces)


def differences(own, reference, texts):
    """The texts that the two read differently, with both lists of ids."""
    expected = reference(texts, add_special_tokens=False)["input_ids"]
    pairs = zip(texts, map(own.ids, texts), expected, strict=True)
    return [(text, actual, ids) for text, actual, ids in pairs if actual != ids]


def of_another_unicode(text):
    """Whether the two compose a text differently: the reference's library has the order of marks
    of an older Unicode than Python's.
    """
    return NFC().normalize_str(text) != unicodedata.normalize("NFC", text)
