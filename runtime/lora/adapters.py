"""LoRA adapters: small changes to a model's weights, merged at the build or between images.

Knows where the files are and which weights they change, of a checkpoint or of a bundle; not the
names of their tensors (`layouts.py`) nor what those compute (`deltas.py`).
"""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import CONTROL, LORA_PARTS, NAMES, SHALLOW, TEXT_ENCODERS, TRANSPOSED
from sdrt.bundle.safetensors import Tensors
from sdrt.engine import Engine
from sdrt.errors import BundleError, CheckpointError, SdrtError, UsageError
from sdrt.json_validation import read_json
from sdrt.runtime.textual_inversion.engine import word_engine_name
from sdrt.runtime.textual_inversion.files import read_bundled
from sdrt.runtime.textual_inversion.layouts import split_bundled
from sdrt.runtime.textual_inversion.store import EmbeddingStore
from sdrt.runtime.textual_inversion.words import Embedding

from .deltas import Change
from .layouts import BIAS, PARTS, LayerKey, flat, format_keys, is_unused, parse_changes
from .names import NO_PICKLES, PICKLES, SUFFIX, find_lora_by_name, loras_folder
from .sets import LoraSet, format_tags, merge_loras
from .settings import FILE
from .tags import LoraWeight, parse_weight

log = logging.getLogger(__name__)

OTHER_ARCHITECTURE = (
    "the LoRA was made for another architecture; use one for this model's (see `sdrt inspect`)"
)
PEFT = "base_model.model."  # before the names of tensors in PEFT's own files


@dataclass(frozen=True, slots=True)
class Lora:
    """A file's name, its changes by part and module, and how much of them is added.

    embeddings: the tensors of the words of textual inversion that the file holds too
    """

    name: str
    changes: Mapping[LayerKey, Change]
    weight: LoraWeight
    embeddings: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


def parse_lora(text: str) -> tuple[str, float]:
    """`"NAME"` or `"NAME:0.8"` -> the name and its weight; raises UsageError."""
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        return text, 1.0
    parse_weight(weight)
    return (name, weight) if colon else (text, weight)


def find_lora(name: str | os.PathLike[str]) -> Path:
    """A file's path, or that of the file of this name in the folder `loras` of sdrt's home (see
    `find_lora_by_name`).

    Raises CheckpointError if there is none.
    """
    path = Path(name).expanduser()
    known = loras_folder()
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{path} is a pickle, which is refused", hint=NO_PICKLES)
    for candidate in (path, known / f"{name}{SUFFIX}", known / path):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder", hint=f"pass the {SUFFIX} file in it")
    try:
        return find_lora_by_name(str(name))
    except UsageError as error:
        raise CheckpointError(error.message, hint=error.hint) from None


def read_lora(name: str | os.PathLike[str], weight: float | LoraWeight) -> Lora:
    """A LoRA file; raises CheckpointError if it is a pickle, damaged or of no known layout."""
    path = find_lora(name)
    try:
        tensors = Tensors(path)
        changes = parse_changes(tensors, tensors.metadata, _peft_config(path, tensors))
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error.message}", hint=error.hint) from error
    except SdrtError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
    return Lora(path.stem, changes, parse_weight(weight), split_bundled(tensors))


def _peft_config(path: Path, keys: Iterable[str]) -> dict[str, Any] | None:
    """The configuration that PEFT saves in a file of its own, next to tensors of its own naming."""
    if not any(key.startswith(PEFT) for key in keys):
        return None
    config = path.with_name(FILE)
    if config.is_file():
        return read_json(config, CheckpointError)
    log.warning("%s has no %s, so its alphas are taken to be its ranks", path.name, config.name)
    return None


def check_parts(loras: Sequence[Lora], parts: Collection[str]) -> None:
    """Raise CheckpointError for a file that changes a part which the model does not have."""
    for lora in loras:
        surplus = [change.key for (part, _), change in lora.changes.items() if part not in parts]
        if surplus:
            raise CheckpointError(
                f"{lora.name}: this model has no place for {surplus[0]}: {format_keys(surplus)} do "
                "not fit",
                hint=OTHER_ARCHITECTURE,
            )


def compute_deltas(
    part: str,
    shapes: Mapping[str, tuple[int, ...]],
    loras: Sequence[Lora],
    base: Callable[[str], np.ndarray] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """What all files together add to each weight of a part.

    Args:
        part: such as `unet`.
        shapes: of all weights by name; a name that ends in `.T` is stored as [in, out].
        loras: in the order in which they are added, which matters to DoRA alone.
        base: gives a weight as it is stored, float32; DoRA and (IA)^3 need it.

    Yields:
        A weight's name and its delta, float32, as the weight is stored.

    Raises:
        CheckpointError: before the first delta for modules that the part does not have, counting
            them and naming the first; for factors that misfit, and deltas that are not finite.
    """
    touched: dict[str, list[tuple[float, Change]]] = {}
    names = names_by_module(shapes)
    for lora in loras:
        own = {module: change for (of, module), change in lora.changes.items() if of == part}
        for module in [module for module in own if is_unused(part, module, names)]:
            log.info("%s: nothing reads what comes of %s", lora.name, own.pop(module).key)
        if missing := [change.key for module, change in own.items() if module not in names]:
            raise CheckpointError(
                f"{lora.name}: this model's {part} has no {missing[0]}: {format_keys(missing)} of "
                f"{len(own)} do not fit",
                hint=OTHER_ARCHITECTURE,
            )
        for module, change in own.items():
            touched.setdefault(names[module], []).append((lora.weight.of(part), change))
    for name, changes in touched.items():
        transposed = name.endswith(TRANSPOSED)
        shape = shapes[name][::-1] if transposed else shapes[name]
        total = np.zeros((), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for weight, change in changes:
                stored = partial(_stored, base, name)
                total = change.merge_delta(total, shape, weight, stored, transposed)
        if not np.isfinite(total).all():
            raise CheckpointError(f"the LoRA's {changes[-1][1].key} adds NaN or infinity")
        yield name, total


def names_by_module(names: Iterable[str]) -> dict[str, str]:
    """The names of weights and biases by module, as `Lora.changes` names them."""
    by_module = {}
    for name in names:
        module, _, kind = name.removesuffix(TRANSPOSED).rpartition(".")
        if kind in ("weight", "bias"):
            by_module[flat(module) + (BIAS if kind == "bias" else "")] = name
    return by_module


def _stored(base: Callable[[str], np.ndarray] | None, name: str) -> np.ndarray:
    assert base is not None, "DoRA and (IA)^3 need the model's weights"
    return base(name)


class Adapters:
    """The LoRA files applied to a bundle's engines. Every change starts from the bundle's own
    weights, so that removing a file leaves nothing of it.
    """

    def __init__(
        self, bundle: Bundle, engines: Mapping[str, Engine], embeddings: EmbeddingStore
    ) -> None:
        self.chosen: LoraSet = ()
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._bundle, self._embeddings = bundle, embeddings
        self._engines = {part: engines[part] for part in set(PARTS) & set(engines)}
        self._shallow, self._control = engines.get(SHALLOW), engines.get(CONTROL)
        self._row_engines = {p: engines[name] for p, name in LORA_PARTS.items() if name in engines}
        words = {part: engines.get(word_engine_name(part)) for part in TEXT_ENCODERS}
        self._word_engines = {part: engine for part, engine in words.items() if engine is not None}

    def set(self, chosen: Mapping[str | os.PathLike[str], float | LoraWeight]) -> None:
        """Apply these files and no others. Nothing changes if one of them does not fit."""
        files = merge_loras((find_lora(name), parse_weight(w)) for name, w in chosen.items())
        stamps = {path: stamp_file(path) for path, _ in files}
        loras = tuple(read_lora(path, weight) for path, weight in files)
        check_parts(loras, self._engines)
        words = [word for lora in loras for word in self._read_words(lora)]
        self._embeddings.check_bundled(words)
        refits = {part: self._refit(part, loras) for part in self._engines}
        try:
            for part, weights in refits.items():
                self._give(part, weights)
        except BaseException:  # whatever it is, no half of a change stays
            for part in self._engines:
                self._give(part, {})
            self._embeddings.set_bundled(())
            self.chosen, self._stamps = (), {}
            raise
        self._embeddings.set_bundled(words)
        self.chosen, self._stamps = files, stamps

    def _read_words(self, lora: Lora) -> list[Embedding]:
        try:
            return read_bundled(lora.embeddings, self._embeddings.widths)
        except CheckpointError as error:
            raise CheckpointError(f"{lora.name}: {error.message}", hint=error.hint) from error

    @property
    def is_outdated(self) -> bool:
        """Whether one of the files was written again since it was read."""
        return any(path.is_file() and stamp_file(path) != was for path, was in self._stamps.items())

    def _give(self, part: str, weights: Mapping[str, np.ndarray]) -> None:
        self._engines[part].refit(weights)
        if part == "unet" and self._control is not None:
            self._control.refit(weights)
        if part in self._row_engines:
            self._row_engines[part].refit(weights)
        if part in self._word_engines:
            self._word_engines[part].refit(weights)
        if part == "unet" and self._shallow is not None:
            reads = self._bundle.manifest.components[SHALLOW].weights
            self._shallow.refit({name: weights[name] for name in reads if name in weights})

    def _refit(self, part: str, loras: Sequence[Lora]) -> dict[str, np.ndarray]:
        """The weights of a part that the files change, in the stored dtype and orientation."""
        if not any(of == part for lora in loras for of, _ in lora.changes):
            return {}
        stored = Tensors(self._bundle.graph(part).with_name("model.safetensors"))
        if stored.metadata != NAMES:
            model = self._bundle.manifest.source.split(",")[0]
            raise BundleError(
                f"{self._bundle.folder} was built without the weights' names that LoRA needs",
                hint=f"run `sdrt build --model {model} --force`",
            )
        shapes = {name: stored.shape(name) for name in stored}
        refit = {}

        def base(name: str) -> np.ndarray:
            return stored[name].astype(np.float32)

        for name, array in compute_deltas(part, shapes, loras, base):
            array += stored[name]
            refit[name] = array.astype(stored[name].dtype, copy=False)
        return refit

    @property
    def text(self) -> str:
        """As other tools write it into a prompt: `<lora:name:0.8>`, and so on."""
        return format_tags(self.chosen)


def stamp_file(path: Path) -> tuple[int, int]:
    """What changes where a file is written again."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size
