"""LoRA files as factors that rows of a batch have of their own, so that images with different files
share calls of the model.

Knows how the graphs of `export/lora_graph.py` lay factors out, and which files can be expressed so:
plain LoRA of linear layers and convolutions of 1x1 in attention blocks, up to the graphs' rank. All
else changes the engines' weights (`adapters.py`).
"""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import LORA_FACTORS, LORA_PARTS, TRANSPOSED, Component
from sdrt.bundle.safetensors import Tensors
from sdrt.engine import Engine, LazyEngine
from sdrt.errors import BundleError, SdrtError

from .adapters import Lora, names_by_module, read_lora, stamp_file
from .deltas import Change
from .layouts import is_unused
from .sets import LoraSet

MAX_CACHED_BYTES = 512_000_000


class RowMisfit(ValueError):
    """LoRA files that no factors express; its text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """The factors of one set of files.

    Attributes:
        files: The set.
        by_part: [P] of every part that the files change, in the graph's dtype.
        digests: Equal for equal factors, by part.
    """

    files: LoraSet
    by_part: Mapping[str, np.ndarray]
    digests: Mapping[str, bytes]

    @property
    def unet(self) -> np.ndarray | None:
        return self.by_part.get("unet")

    @property
    def changes_text(self) -> bool:
        """Whether a text encoder has factors."""
        return any(part != "unet" for part in self.by_part)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's place in P, and its widths."""

    start: int
    inside: int
    out: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """The places of a part's layers, by module as LoRA files are parsed.

    names: Of all weights of the part, by module.
    """

    layers: Mapping[str, _Layer]
    names: Mapping[str, str]
    rank: int
    size: int
    dtype: str


@dataclass(slots=True)
class LoraRows:
    """Reads LoRA files for rows of one bundle's engines.

    Attributes:
        bundle: The bundle.
        engines: By component.
    """

    bundle: Bundle
    engines: Mapping[str, Engine]
    _layouts: dict[str, _Layout] = field(default_factory=dict)
    _cache: dict[object, LoraFactors] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_available(self) -> bool:
        """Whether the bundle has the graphs, and the backend runs them."""
        return LORA_PARTS["unet"] in self.engines

    def pack(self, files: LoraSet) -> LoraFactors:
        """The factors of a set of files; those read last are cached.

        Raises:
            RowMisfit: There are none, with the reason.
        """
        try:
            key = files, tuple(stamp_file(path) for path, _ in files)
            with self._lock:
                if (cached := self._cache.pop(key, None)) is None:
                    cached = self._pack(files)
                self._cache[key] = cached  # as the last
                self._evict()
        except (OSError, SdrtError) as error:  # reported where the weights are changed
            raise RowMisfit(str(error)) from error
        return cached

    def _evict(self) -> None:
        while len(self._cache) > 1 and self._cached_bytes() > MAX_CACHED_BYTES:
            del self._cache[next(iter(self._cache))]

    def _cached_bytes(self) -> int:
        return sum(row.nbytes for of in self._cache.values() for row in of.by_part.values())

    def _pack(self, files: LoraSet) -> LoraFactors:
        loras = [read_lora(path, weight) for path, weight in files]
        for lora in loras:
            if lora.embeddings:
                raise RowMisfit(f"{lora.name} has words of textual inversion")
        parts = sorted({part for lora in loras for part, _ in lora.changes})
        rows = {part: self._pack_part(part, loras) for part in parts}
        digests = {part: hashlib.sha256(row.tobytes()).digest() for part, row in rows.items()}
        return LoraFactors(files, rows, digests)

    def _pack_part(self, part: str, loras: Sequence[Lora]) -> np.ndarray:
        """[P] of all files together: their factors follow each other along the rank."""
        layout = self._layout(part)
        row = np.zeros(layout.size, np.float32)
        used: dict[str, int] = {}
        for lora in loras:
            own = {module: change for (of, module), change in lora.changes.items() if of == part}
            for module, change in own.items():
                if is_unused(part, module, layout.names):
                    continue
                if module not in layout.layers:
                    raise RowMisfit(f"{lora.name} changes {change.key}, which has no factors")
                layer, at = layout.layers[module], used.get(module, 0)
                down, up = _low_rank(lora, change, layer, lora.weight.of(part))
                end = used[module] = at + len(up)
                if end > layout.rank:
                    raise RowMisfit(
                        f"{change.key} has rank {end} with {lora.name}; the bundle was built for "
                        f"rank {layout.rank}"
                    )
                _place(row, layer, layout.rank, slice(at, end), down, up)
        with np.errstate(over="ignore"):
            packed = row.astype(layout.dtype)
        if not np.isfinite(packed).all():
            raise RowMisfit(f"the factors of {part} overflow {layout.dtype}")
        return packed

    def _layout(self, part: str) -> _Layout:
        if part not in self._layouts:
            component = self.bundle.manifest.components.get(LORA_PARTS[part])
            if component is None:
                raise RowMisfit(f"the bundle's {part} has no graph with factors")
            graph = self.bundle.graph(LORA_PARTS[part])
            self._layouts[part] = _read_layout(component, graph.with_name("model.safetensors"))
        return self._layouts[part]


def _read_layout(component: Component, weights: Path) -> _Layout:
    """The layout of a part; raises BundleError where the manifest does not fit the weights."""
    stored = Tensors(weights)
    names = names_by_module(stored)
    modules = {name: module for module, name in names.items()}
    layers, widths = {}, 0
    try:
        for name in component.weights:
            first, second, *_ = stored.shape(name)
            out, inside = (second, first) if name.endswith(TRANSPOSED) else (first, second)
            layers[modules[name]] = _Layer(widths, inside, out)
            widths += inside + out
        (spec,) = (spec for spec in component.inputs if spec.name == LORA_FACTORS)
        size = int(spec.shape[1])
        rank, rest = divmod(size, widths)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise BundleError(f"{weights.parent}: unknown layers with LoRA factors") from error
    if rest:
        raise BundleError(f"{weights.parent}: {size} LoRA factors for widths of {widths} in all")
    layers = {m: _Layer(rank * at.start, at.inside, at.out) for m, at in layers.items()}
    return _Layout(layers, names, rank, size, spec.dtype)


def _low_rank(
    lora: Lora, change: Change, layer: _Layer, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """`down` [in, r] and `up` [r, out] of a change."""
    factors = change.low_rank_factors(layer.out, layer.inside, weight)
    if factors is None:
        raise RowMisfit(f"{lora.name}: {change.key} is no LoRA of a linear layer of this model")
    return factors


def _place(
    row: np.ndarray, layer: _Layer, rank: int, ranks: slice, down: np.ndarray, up: np.ndarray
) -> None:
    """Write the factors of a layer to its place in P: `down` [in, rank], then `up` [rank, out]."""
    middle = layer.start + layer.inside * rank
    end = middle + rank * layer.out
    row[layer.start : middle].reshape(layer.inside, rank)[:, ranks] = down
    row[middle:end].reshape(rank, layer.out)[ranks] = up


def load_lora_engine(engines: Mapping[str, Engine]) -> None:
    """Load the UNet with factors now rather than in the loop, where other images would wait."""
    engine = engines[LORA_PARTS["unet"]]
    if isinstance(engine, LazyEngine):
        engine.warm_up()
