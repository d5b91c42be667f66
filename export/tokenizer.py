"""A checkpoint's tokenizer as transformers reads it, written for the runtime's own.

Knows the files of a tokenizer's folder, of which transformers has had several sets, and which of
their settings change ids; leaves it to transformers which file wins where they disagree.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdrt.errors import CheckpointError
from sdrt.json_validation import shorten
from sdrt.runtime.text.added_tokens import AddedToken
from sdrt.runtime.text.tokenizer import END, MAX_TOKENS, ROLES, START

from .weights import read_json

log = logging.getLogger("sdrt.build")
CONFIG, TOKENIZER, VOCAB, MERGES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
)
SMALL = ("added_tokens.json", "special_tokens_map.json")
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
# Settings that change ids, with the value that is supported.
FIXED = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
READ = (
    *(*FIXED, *ROLES, "added_tokens_decoder", "additional_special_tokens", "model_max_length"),
    *("extra_special_tokens", "max_len", "tokenizer_class"),
)
UNLIMITED = 10**20  # from here on transformers neither pads nor truncates


@dataclass(frozen=True, slots=True)
class CheckpointTokenizer:
    """What decides a prompt's ids.

    vocab: ids of byte pairs; merges: in their order; added: by id
    roles: the tokens that begin, end and pad a prompt and stand for what is unknown
    length: of every prompt's ids; None if it is not limited
    """

    vocab: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    added: Mapping[int, AddedToken]
    roles: Mapping[str, str]
    length: int | None

    @property
    def tokens(self) -> int:
        """The number of rows that a text encoder needs."""
        return 1 + max(*self.vocab.values(), *self.added)

    def write(self, folder: Path) -> None:
        """The files that `runtime.Tokenizer` reads."""
        folder.mkdir()
        (folder / VOCAB).write_text(json.dumps(self.vocab, ensure_ascii=False), "utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / MERGES).write_text("\n".join(lines) + "\n", "utf-8")
        usual = {role: START if role == "bos_token" else END for role in ROLES}
        config: dict[str, Any] = {r: t for r, t in self.roles.items() if t != usual[r]}
        plain = {AddedToken(token, special=True, normalized=False) for token in (START, END)}
        if set(self.added.values()) != plain:
            config["added_tokens_decoder"] = {n: asdict(t) for n, t in self.added.items()}
        if config:
            text = json.dumps(config, ensure_ascii=False, indent=1) + "\n"
            (folder / CONFIG).write_text(text, "utf-8")


def missing_files(folder: Path) -> list[str]:
    """The files that a tokenizer's folder needs and does not have."""
    if (folder / TOKENIZER).is_file():
        return []
    return [name for name in (VOCAB, MERGES) if not (folder / name).is_file()]


def read_tokenizer(folder: Path, named: str | None = None) -> CheckpointTokenizer:
    """The tokenizer in a folder; raises CheckpointError if it is not CLIP's, is damaged, or has a
    setting that changes ids and is not supported.

    named: the class that `model_index.json` names
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    _check_class(folder, config, named)
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{folder / CONFIG}: {key}={shorten(config[key])} is not supported; "
                f"expected {value!r}"
            )
    known = {k: v for k, v in config.items() if k in READ or k.endswith("_token")}
    if ignored := sorted(set(config) - set(known)):
        log.debug("%s: settings that change no ids: %s", folder / CONFIG, ", ".join(ignored))
    with tempfile.TemporaryDirectory() as copy:
        _copy_files(folder, known, Path(copy))
        try:
            return _read_by_transformers(Path(copy))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # its library panics on some files, which is no Exception
            said = str(error).split("\n")[0].replace(copy, str(folder))
            raise CheckpointError(
                f"{folder} holds no tokenizer that transformers can read: {said[:300]}; "
                "save or fetch it again"
            ) from error


def _check_class(folder: Path, config: Mapping[str, Any], named: str | None) -> None:
    kinds = [named, config.get("tokenizer_class")]
    if (folder / TOKENIZER).is_file():
        model = read_json(folder / TOKENIZER).get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        kinds.append(None if kind == "BPE" else f"{TOKENIZER} of type {kind}")
    for kind in kinds:
        if kind is not None and kind not in CLASSES:
            raise CheckpointError(
                f"{folder} is for {shorten(kind)}, which is not supported; expected {CLASSES[0]}"
            )


def _copy_files(folder: Path, config: Mapping[str, Any], copy: Path) -> None:
    """Only what is known here: a configuration can name files elsewhere."""
    (copy / CONFIG).write_text(json.dumps(config))
    for name in (TOKENIZER, VOCAB, *SMALL):
        if (folder / name).is_file():
            read_json(folder / name)  # bounded, and no name twice
    for name in (TOKENIZER, VOCAB, MERGES, *SMALL):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, copy / name)


def _read_by_transformers(folder: Path) -> CheckpointTokenizer:
    import transformers

    library: Any = transformers  # 5 has this class under an alias that type checkers do not see
    read = library.CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    for key, value in FIXED.items():  # these can come from tokenizer.json too
        if getattr(read, key, value) != value:
            raise ValueError(f"{key} is {getattr(read, key)!r}, expected {value!r}")
    state = json.loads(read.backend_tokenizer.to_str())
    model = state["model"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if any(len(pair) != 2 or len(" ".join(pair).split()) != 2 for pair in merges):
        raise ValueError("a merge is not of two pieces without spaces")
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    added = {
        item["id"]: AddedToken(item["content"], **{flag: item[flag] for flag in flags})
        for item in state["added_tokens"]
    }
    if max(*model["vocab"].values(), *added) >= MAX_TOKENS:
        raise ValueError(f"an id is {MAX_TOKENS:,} or more")
    length = read.model_max_length
    return CheckpointTokenizer(
        model["vocab"],
        tuple((low, high) for low, high in merges),
        added,
        {role: str(getattr(read, role)) for role in ROLES},
        None if length >= UNLIMITED else int(length),
    )
