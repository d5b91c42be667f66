"""What calls of a pipeline's engines cost on this machine, measured once and cached.

Knows engines and their input specs; not what they generate.
"""

import hashlib
import json
import logging
import math
import platform
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdrt.atomic_files import write_atomic
from sdrt.bundle.manifest import TensorSpec
from sdrt.engine import Engine, Feeds
from sdrt.engine.gpu import detect_gpus
from sdrt.engine.protocol import StaticShapes
from sdrt.errors import BackendError
from sdrt.json_validation import integer, json_object, number, read_bytes
from sdrt.process_stats import (
    available_bytes,
    cpu_count,
    forget_peak,
    peak_bytes,
    resident_bytes,
    total_bytes,
)

from .scheduler import CostEstimates

if TYPE_CHECKING:
    from sdrt.runtime.pipeline import Pipeline

log = logging.getLogger(__name__)
Size = tuple[int, int]
REPEATS = 3
LONG_CALL = 1.0  # seconds from which a call is measured once, after one that sets things up
VERY_LONG_CALL = 5.0  # seconds from which further calls need none before, and have no more rows
MAX_FILE_BYTES = 1_000_000  # of a cached file, which may have come with an untrusted bundle
SECONDS, ROWS, COUNT = number(0.0, 1e6), integer(1, 4096), integer(-(2**50), 2**50)
MIN_GAIN = 1.05  # in images per second, for more rows in a call to be worth it
LEARNING_RATE = 0.1  # weight of a new measurement in the drift
MEMORY_FRACTION = 0.8  # of the free memory, for calls of the model
MAX_ESTIMATED = 64  # sizes that are cached without having been measured


@dataclass(slots=True)
class SizeCosts:
    """The costs of one image size.

    Attributes:
        call_seconds: Seconds of a call of the model by rows.
        call_bytes: Memory that a call adds to the process, by rows.
        max_rows: Rows of a call beyond which throughput hardly grows.
        full_rows: Rows of a call with the highest throughput.
        decode_seconds: Seconds of decoding an image.
        drift: What calls take now, relative to `call_seconds`.
        shallow_ratio: A call of the shallow part relative to one of the full model; learned from
            its calls, so that it is not loaded just to be measured.
        control_ratio: What ControlNets take, relative to what their weights suggest; learned too.
    """

    call_seconds: dict[int, float]
    call_bytes: dict[int, int]
    max_rows: int
    full_rows: int
    decode_seconds: float
    drift: float = 1.0
    shallow_ratio: float = 1.0
    control_ratio: float = 1.0

    def seconds(self, rows: int) -> float:
        """Seconds of a call: interpolated between measured rows, proportional beyond them."""
        known = sorted(self.call_seconds)
        if rows > known[-1]:
            return self.drift * self.call_seconds[known[-1]] * rows / known[-1]
        return self.drift * float(np.interp(rows, known, [self.call_seconds[k] for k in known]))

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a call, so that estimates follow the load of the machine."""
        ratio = self.drift * seconds / self.seconds(rows)
        self.drift += LEARNING_RATE * (min(max(ratio, 0.1), 10.0) - self.drift)

    def observe_shallow(self, rows: int, seconds: float) -> None:
        """Learn from a call of the shallow part, which never takes longer than a full one."""
        ratio = min(seconds / self.seconds(rows), 1.0)
        self.shallow_ratio += LEARNING_RATE * (ratio - self.shallow_ratio)

    def observe_control(self, rows: int, control_cost: float, seconds: float) -> None:
        """Learn from a call with ControlNets of this cost, relative to the model's."""
        extra = (seconds / self.seconds(rows) - 1.0) / control_cost
        self.control_ratio += LEARNING_RATE * (min(max(extra, 0.1), 10.0) - self.control_ratio)


@dataclass(slots=True)
class CostModel:
    """The costs of all sizes of a bundle. A batch key begins with its size.

    Attributes:
        encode_seconds: Seconds of encoding a prompt.
        sizes: Measured sizes.
        base_bytes: Memory of the process before the measurement.
        estimated: Sizes estimated from measured ones.
    """

    encode_seconds: float
    sizes: dict[Size, SizeCosts]
    base_bytes: int = 0
    estimated: dict[Size, SizeCosts] = field(default_factory=dict, repr=False, compare=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def for_key(self, key: Hashable) -> SizeCosts:
        assert isinstance(key, tuple)
        return self.for_size(key[0])

    def for_size(self, size: Size) -> SizeCosts:
        """The costs of a size; if it was not measured, those of the nearest one scaled by area."""
        if size in self.sizes:
            return self.sizes[size]
        with self.lock:
            if size not in self.estimated:
                for old in list(self.estimated)[: 1 - MAX_ESTIMATED]:
                    del self.estimated[old]
                self.estimated[size] = self._estimate(size)
            return self.estimated[size]

    def _estimate(self, size: Size) -> SizeCosts:
        area = size[0] * size[1]
        near = min(self.sizes, key=lambda known: abs(math.log(area / (known[0] * known[1]))))
        known, ratio = self.sizes[near], area / (near[0] * near[1])
        calls = {rows: ratio * seconds for rows, seconds in known.call_seconds.items()}
        call_bytes = {rows: round(ratio * count) for rows, count in known.call_bytes.items()}
        limits = (known.max_rows, known.full_rows)
        max_rows, full_rows = (max(1, min(rows, round(rows / ratio))) for rows in limits)
        decode_seconds = ratio * known.decode_seconds
        return SizeCosts(
            *(calls, call_bytes, max_rows, full_rows, decode_seconds),
            known.drift,
            known.shallow_ratio,
            known.control_ratio,
        )

    def estimates(self, max_rows: int | None = None) -> CostEstimates:
        """The scheduler's estimates; max_rows replaces the measured rows of a call."""
        return CostEstimates(
            call_seconds=lambda key, rows: self.for_key(key).seconds(rows),
            max_rows=lambda key: max_rows or self.for_key(key).max_rows,
            prepare_seconds=lambda key: self.encode_seconds,
            decode_seconds=lambda key: self.for_key(key).decode_seconds,
            shallow_ratio=lambda key: self.for_key(key).shallow_ratio,
            control_ratio=lambda key: self.for_key(key).control_ratio,
            full_rows=lambda key: max_rows or self.for_key(key).full_rows,
        )

    def missing_bytes(self, size: Size, rows: int) -> int:
        """Memory that a call needs beyond what is free; 0 if it fits."""
        known = self.for_size(size).call_bytes
        near = min((k for k in known if k >= rows), default=max(known))
        needed = self.base_bytes + known[near] - resident_bytes()
        return max(0, needed - available_bytes())


def load_cost_model(pipe: "Pipeline", max_rows: int, cache_folder: Path | None = None) -> CostModel:
    """Read the costs measured here before, or measure them.

    Args:
        pipe: The pipeline.
        max_rows: Largest number of rows to try.
        cache_folder: Where costs are cached, such as the bundle's `plans`.
    """
    path = cache_folder / f"costs-{_cache_key(pipe, max_rows)}.json" if cache_folder else None
    if path and path.is_file():
        try:
            return _costs_from_json(json_object(read_bytes(path, MAX_FILE_BYTES)))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            log.warning("failed to read %s (%s); measuring again", path, error)
    costs = measure_costs(pipe, max_rows)
    if path:
        try:
            write_atomic(path, json.dumps(_costs_to_json(costs), indent=1).encode())
        except OSError as error:  # a read-only bundle is measured at every start
            log.info("measured costs are not cached: %s", error)
    return costs


def measure_costs(pipe: "Pipeline", max_rows: int) -> CostModel:
    """Call every engine at every size, with more rows while throughput grows and memory fits."""
    base = resident_bytes()
    manifest = pipe.manifest
    sizes = {}
    for width, height in manifest.sizes:
        sides = height // manifest.downscale, width // manifest.downscale
        sizes[width, height] = _size_costs(pipe, sides, max_rows, base)
    encoders = ("text_encoder", "text_encoder_2")
    encode = sum(_component_seconds(pipe, name, (0, 0)) for name in encoders)
    return CostModel(encode, sizes, base)


def _size_costs(pipe: "Pipeline", sides: tuple[int, int], max_rows: int, base: int) -> SizeCosts:
    calls: dict[int, Callable[[], object]] = {}
    seconds: dict[int, float] = {}
    call_bytes: dict[int, int] = {}
    best, rows, unet, is_very_long = 0, 1, pipe.engines["unet"], False
    while rows <= max_rows:
        calls[rows] = partial(unet, zero_inputs(unet, rows, sides, pipe.manifest.max_tokens))
        forget_peak()
        try:
            first = _seconds(calls[rows])
        except BackendError as error:
            if rows <= 2:
                raise
            log.info("calls of %d rows are not used: %s", rows, error)
            break
        is_long = first >= LONG_CALL
        compared = {rows} if is_long or not best else {best, rows}
        if is_very_long:
            seconds[rows] = first
        else:
            seconds |= _least_seconds({rows: calls[rows] for rows in compared}, is_long)
        call_bytes[rows] = peak_bytes() - base
        if rows <= 2 or seconds[best] / best / (seconds[rows] / rows) >= MIN_GAIN:
            best = rows
        elif is_long or rows > 2 * best:
            break
        is_very_long = seconds[rows] >= VERY_LONG_CALL
        if is_very_long and rows >= 2:
            break
        if 2 * call_bytes[rows] > MEMORY_FRACTION * (available_bytes() + call_bytes[rows]):
            break
        rows *= 2
    full = min(seconds, key=lambda rows: seconds[rows] / rows)
    decode_seconds = _component_seconds(pipe, "vae_decoder", sides, once=is_very_long)
    return SizeCosts(seconds, call_bytes, best, max(best, full), decode_seconds)


def _component_seconds(
    pipe: "Pipeline", name: str, sides: tuple[int, int], *, once: bool = False
) -> float:
    """Seconds of a call of a component; 0 if the model has none. Once: of its first call."""
    if name not in pipe.manifest.components:
        return 0.0
    engine = pipe.engines[name]
    call = partial(engine, zero_inputs(engine, 1, sides, pipe.manifest.max_tokens))
    return _seconds(call) if once else _median_seconds(call)


def _median_seconds(call: Callable[[], object]) -> float:
    return statistics.median(_seconds(call) for _ in range(1 if _is_long(call) else REPEATS))


def _least_seconds(calls: Mapping[int, Callable[[], object]], is_long: bool) -> dict[int, float]:
    """Of calls by rows, in turns, so that other work on the machine slows all of them down."""
    turns = [
        {rows: _seconds(call) for rows, call in calls.items()}
        for _ in range(1 if is_long else REPEATS)
    ]
    return {rows: min(turn[rows] for turn in turns) for rows in calls}


def _is_long(call: Callable[[], object]) -> bool:
    """Whether a call is too long to be repeated. It is the first one, which sets things up."""
    return _seconds(call) >= LONG_CALL


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def get_memory_info() -> dict[str, int]:
    """Bytes: `free`, `used` by this process, `total`, and `gpu` of the first GPU if there is
    one.
    """
    memory = {"free": available_bytes(), "used": resident_bytes(), "total": total_bytes()}
    gpus = detect_gpus().gpus
    return memory | ({"gpu": gpus[0].memory} if gpus else {})


def is_model_callable(pipe: "Pipeline") -> bool:
    """Whether a call of the model succeeds."""
    manifest = pipe.manifest
    width, height = manifest.sizes[0]
    sides = height // manifest.downscale, width // manifest.downscale
    try:
        unet = pipe.engines["unet"]
        unet(zero_inputs(unet, 1, sides, manifest.max_tokens))
    except Exception:
        log.exception("a call of the model failed")
        return False
    return True


def zero_inputs(engine: Engine, rows: int, sides: tuple[int, int], tokens: int) -> Feeds:
    """Zeros for every input of an engine; `sides` are the latent height and width."""
    lengths = {"rows": rows, "tokens": tokens, "latent_height": sides[0], "latent_width": sides[1]}

    def zeros(spec: TensorSpec) -> np.ndarray:
        shape = [axis if isinstance(axis, int) else lengths[axis] for axis in spec.shape]
        return np.zeros(shape, spec.dtype)

    return {spec.name: zeros(spec) for spec in engine.inputs}


def _cache_key(pipe: "Pipeline", max_rows: int) -> str:
    """What the costs depend on."""
    from sdrt.version import __version__

    files = sorted((name, record.sha256) for name, record in pipe.manifest.files.items())
    machine = [platform.processor(), platform.node(), cpu_count()]
    unet = pipe.engines["unet"]
    shapes = dict(unet.static_shapes) if isinstance(unet, StaticShapes) else None
    known = [__version__, pipe.backend, pipe.precision, shapes, max_rows, files, *machine]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


def _costs_to_json(costs: CostModel) -> dict[str, Any]:
    sizes = {
        f"{width}x{height}": {
            "calls": size.call_seconds,
            "bytes": size.call_bytes,
            "most": size.max_rows,
            "full": size.full_rows,
            "decode": size.decode_seconds,
        }
        for (width, height), size in costs.sizes.items()
    }
    return {"encode": costs.encode_seconds, "base": costs.base_bytes, "sizes": sizes}


def _costs_from_json(raw: dict[str, Any]) -> CostModel:
    """Raises ValueError, KeyError, TypeError or AttributeError for invalid contents."""
    sizes = {}
    for name, size in raw["sizes"].items():
        width, height = (int(side) for side in name.split("x"))
        calls = {int(rows): SECONDS(seconds, "a call") for rows, seconds in size["calls"].items()}
        call_bytes = {int(rows): COUNT(count, "bytes") for rows, count in size["bytes"].items()}
        max_rows, full_rows = ROWS(size["most"], "most"), ROWS(size["full"], "full")
        decode = SECONDS(size["decode"], "a decode")
        if not calls or not call_bytes or min(*calls, *call_bytes) < 1 or not all(calls.values()):
            raise ValueError(f"invalid costs of {width}x{height}")
        sizes[width, height] = SizeCosts(calls, call_bytes, max_rows, full_rows, decode)
    return CostModel(SECONDS(raw["encode"], "encode"), sizes, resident_bytes())
