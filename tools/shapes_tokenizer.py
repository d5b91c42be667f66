"""A CLIP-format byte-pair vocabulary for the words that captions of `shapes` are made of.

Any other text still has tokens: the base alphabet covers every byte, alone and at a word's end.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

from shapes_scenes import COLOURS, PLACES, RADII, RELATIONS, SHAPES

LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = [
    *COLOURS,
    *SHAPES,
    *PLACES,
    *RELATIONS,
    *RADII,
    "a an on background the picture of in middle",
]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte, in vocabulary order (GPT-2's alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def merges_from_words(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        pair = min(counts, key=lambda p: (-counts[p], p))
        merges.append(pair)
        pieces = [merged(word, pair) for word in pieces]
    return merges


def merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word with every occurrence of the pair joined, left to right."""
    out: list[str] = []
    i = 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def write_tokenizer(folder: Path) -> int:
    """Write vocab.json, merges.txt and their configuration; returns the number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in TEXTS for word in text.split()})
    merges = merges_from_words(words)
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [*("".join(pair) for pair in merges), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    config["do_lower_case"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return len(vocab)
