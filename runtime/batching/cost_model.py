"""What calls of a pipeline's engines cost here: seconds and bytes, measured once and kept.

Knows engines and their input specs; not what is made with them.
"""

import hashlib
import json
import logging
import math
import platform
import statistics
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdrt.atomic_files import write_atomic
from sdrt.bundle.manifest import TensorSpec
from sdrt.engine import Engine, Feeds
from sdrt.engine.gpu import detect_gpus
from sdrt.json_validation import integer, json_object, number, read_bytes
from sdrt.process_stats import (
    available_bytes,
    cpu_count,
    forget_peak,
    peak_bytes,
    resident_bytes,
    total_bytes,
)

from .scheduler import Rates

if TYPE_CHECKING:
    from sdrt.runtime.pipeline import Pipeline

log = logging.getLogger(__name__)
Size = tuple[int, int]
REPEATS = 3
MAX_KEPT = 1_000_000  # bytes of a file of figures, which may have come with a bundle
SECONDS, ROWS, COUNT = number(0.0, 1e6), integer(1, 4096), integer(-(2**50), 2**50)
GAIN = 1.05  # more rows in a call must make this much more of a picture a second
LEARNED = 0.1  # share of a new measurement in the drift
MEMORY_SHARE = 0.8  # of the memory that is free, for calls of the model
MAX_ESTIMATED = 64  # sizes that are remembered without having been measured


@dataclass(slots=True)
class SizeCosts:
    """One size. calls: seconds by rows. bytes: what calls of so many rows add to the process.

    most: rows of one call; more of them make no more pictures a second
    decode: seconds. drift: what calls take now, relative to `calls`
    shallow: what one of the model's shallow part takes of one of the whole; learned when it is
        first called, so that nobody loads what nobody asks for
    """

    calls: dict[int, float]
    bytes: dict[int, int]
    most: int
    decode: float
    drift: float = 1.0
    shallow: float = 1.0

    def seconds(self, rows: int) -> float:
        """Of one call, between the measured ones by a line, beyond them in proportion."""
        known = sorted(self.calls)
        if rows > known[-1]:
            return self.drift * self.calls[known[-1]] * rows / known[-1]
        return self.drift * float(np.interp(rows, known, [self.calls[k] for k in known]))

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a call, so that a forecast knows a machine that others use too."""
        ratio = self.drift * seconds / self.seconds(rows)
        self.drift += LEARNED * (min(max(ratio, 0.1), 10.0) - self.drift)

    def observe_shallow(self, rows: int, seconds: float) -> None:
        """Learn from a call of the shallow part; it never takes more than the whole."""
        self.shallow += LEARNED * (min(seconds / self.seconds(rows), 1.0) - self.shallow)


@dataclass(slots=True)
class Costs:
    """All sizes of a bundle; encode: seconds of a prompt. Groups begin with their size."""

    encode: float
    sizes: dict[Size, SizeCosts]
    base: int = 0
    estimated: dict[Size, SizeCosts] = field(default_factory=dict, repr=False, compare=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def of(self, group: Hashable) -> SizeCosts:
        assert isinstance(group, tuple)
        return self.of_size(group[0])

    def of_size(self, size: Size) -> SizeCosts:
        """A measured size's; of another, those of the nearest measured one by their areas, which
        learn from its calls.
        """
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
        known, share = self.sizes[near], area / (near[0] * near[1])
        calls = {rows: share * seconds for rows, seconds in known.calls.items()}
        grown = {rows: round(share * count) for rows, count in known.bytes.items()}
        most = max(1, min(known.most, round(known.most / share)))
        return SizeCosts(calls, grown, most, share * known.decode, known.drift, known.shallow)

    def rates(self, most: int | None = None) -> Rates:
        """most: rows of one call, instead of the measured ones."""
        return Rates(
            call=lambda group, rows: self.of(group).seconds(rows),
            most=lambda group: most or self.of(group).most,
            before=lambda group: self.encode,
            after=lambda group: self.of(group).decode,
            shallow=lambda group: self.of(group).shallow,
        )

    def missing_bytes(self, size: Size, rows: int) -> int:
        """What a call would need beyond what this machine has free; 0 if it fits."""
        known = self.of_size(size).bytes
        near = min((k for k in known if k >= rows), default=max(known))
        needed = self.base + known[near] - resident_bytes()
        return max(0, needed - available_bytes())


def costs_of(pipe: "Pipeline", most: int, kept: Path | None = None) -> Costs:
    """Measure, or read what was measured here before.

    most: rows to try. kept: a folder for the figures, such as the bundle's `plans`.
    """
    path = kept / f"costs-{_key(pipe, most)}.json" if kept else None
    if path and path.is_file():
        try:
            return _costs_from_json(json_object(read_bytes(path, MAX_KEPT)))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            log.warning("%s is not readable (%s); measuring again", path, error)
    costs = measured(pipe, most)
    if path:
        try:
            write_atomic(path, json.dumps(_json_from_costs(costs), indent=1).encode())
        except OSError as error:  # a read-only bundle is measured at every start
            log.info("costs are not kept: %s", error)
    return costs


def measured(pipe: "Pipeline", most: int) -> Costs:
    """Call every engine at every size, with more rows as long as that pays and fits."""
    base = resident_bytes()
    manifest = pipe.manifest
    sizes = {}
    for width, height in manifest.sizes:
        sides = height // manifest.downscale, width // manifest.downscale
        sizes[width, height] = _size_costs(pipe, sides, most, base)
    encode = sum(_seconds_of(pipe, name, (0, 0)) for name in ("text_encoder", "text_encoder_2"))
    return Costs(encode, sizes, base)


def _size_costs(pipe: "Pipeline", sides: tuple[int, int], most: int, base: int) -> SizeCosts:
    calls, grown = {}, {}
    best, rows, unet = 0, 1, pipe.engines["unet"]
    while rows <= most:
        feeds = made_up(unet, rows, sides, pipe.manifest.max_tokens)
        forget_peak()
        calls[rows] = _seconds(partial(unet, feeds))
        grown[rows] = peak_bytes() - base
        paid = best and calls[best] / best / (calls[rows] / rows) >= GAIN
        if best and rows > 2 and not paid:
            break
        best, rows = rows, rows * 2
        if 2 * grown[best] > MEMORY_SHARE * (available_bytes() + grown[best]):
            break
    return SizeCosts(calls, grown, best, _seconds_of(pipe, "vae_decoder", sides))


def _seconds_of(pipe: "Pipeline", name: str, sides: tuple[int, int]) -> float:
    """Of one call of a component; 0 where the model has none."""
    if name not in pipe.manifest.components:
        return 0.0
    engine = pipe.engines[name]
    return _seconds(partial(engine, made_up(engine, 1, sides, pipe.manifest.max_tokens)))


def _seconds(call: Callable[[], object]) -> float:
    """The median; the first call, which sets things up, and repeats of long ones left out."""
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    times = []
    for _ in range(REPEATS if first < 1.0 else 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def memory_of_machine() -> dict[str, int]:
    """Bytes: free, used by this process, in total; gpu: those of the first GPU, if there is one."""
    found = {"free": available_bytes(), "used": resident_bytes(), "total": total_bytes()}
    gpus = detect_gpus().gpus
    return found | ({"gpu": gpus[0].memory} if gpus else {})


def works(pipe: "Pipeline") -> bool:
    """Whether the model can be called at all."""
    manifest = pipe.manifest
    width, height = manifest.sizes[0]
    sides = height // manifest.downscale, width // manifest.downscale
    try:
        unet = pipe.engines["unet"]
        unet(made_up(unet, 1, sides, manifest.max_tokens))
    except Exception:
        log.exception("the model cannot be called")
        return False
    return True


def made_up(engine: Engine, rows: int, sides: tuple[int, int], tokens: int) -> Feeds:
    """Zeros for every input of an engine; sides: latent height and width."""
    named = {"rows": rows, "tokens": tokens, "latent_height": sides[0], "latent_width": sides[1]}

    def zeros(spec: TensorSpec) -> np.ndarray:
        shape = [axis if isinstance(axis, int) else named[axis] for axis in spec.shape]
        return np.zeros(shape, spec.dtype)

    return {spec.name: zeros(spec) for spec in engine.inputs}


def _key(pipe: "Pipeline", most: int) -> str:
    """What the figures depend on."""
    from sdrt.version import __version__

    files = sorted((name, record.sha256) for name, record in pipe.manifest.files.items())
    cores = cpu_count()
    known = [__version__, pipe.backend, most, files, platform.processor(), platform.node(), cores]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


def _json_from_costs(costs: Costs) -> dict[str, Any]:
    sizes = {
        f"{w}x{h}": {"calls": c.calls, "bytes": c.bytes, "most": c.most, "decode": c.decode}
        for (w, h), c in costs.sizes.items()
    }
    return {"encode": costs.encode, "base": costs.base, "sizes": sizes}


def _costs_from_json(raw: dict[str, Any]) -> Costs:
    """Raises ValueError, KeyError, TypeError or AttributeError for what are no figures."""
    sizes = {}
    for name, each in raw["sizes"].items():
        width, height = (int(side) for side in name.split("x"))
        calls = {int(rows): SECONDS(seconds, "a call") for rows, seconds in each["calls"].items()}
        grown = {int(rows): COUNT(count, "bytes") for rows, count in each["bytes"].items()}
        most, decode = ROWS(each["most"], "most"), SECONDS(each["decode"], "a decode")
        if not calls or not grown or min(*calls, *grown) < 1 or not all(calls.values()):
            raise ValueError(f"no figures of {width}x{height}")
        sizes[width, height] = SizeCosts(calls, grown, most, decode)
    return Costs(SECONDS(raw["encode"], "encode"), sizes, resident_bytes())
