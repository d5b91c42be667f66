"""Whether images of a size fit into memory, estimated before anything runs.

Knows the bundle's graphs and measured overheads of backends. A graph's activations grow with the
pixels. Where a backend has no fused kernel, attention's score matrix, heads x tokens x tokens, is
in memory and grows with their square. `memory_budget` checks what loading needs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sdrt.bundle import Bundle
from sdrt.bundle.onnx_check import graph_values
from sdrt.errors import UsageError
from sdrt.process_stats import resident_bytes

from .axes import axis_lengths, evaluate_axis
from .gpu import Gpu
from .memory_budget import activation_bytes, free_bytes

Size = tuple[int, int]
SCORE_BYTES = 4  # of one score, float32 on CPUs
# Memory that a call adds to the process, in multiples of the manifest's activations: measured at
# 256, 512, 640 and 768 pixels a side, within 25 %. Other backends are not measured: a lower bound.
OVERHEAD = {"onnxruntime on cpu": 3.0, "torch on cpu": 1.8, "openvino on cpu": 2.4}


@dataclass(slots=True)
class MemoryEstimator:
    """Estimates the memory of calls on a loaded bundle's backend.

    Attributes:
        gpu: The GPU it runs on; None for the host.
        backend: Its title, such as `onnxruntime on cpu`.
        baseline_bytes: The process's memory after loading.
        reduced_precision: Whether activations have half the bytes of float32.
        largest_fit: The largest need that fitted on a GPU, where backends do not return memory.
    """

    bundle: Bundle
    gpu: Gpu | None
    backend: str
    baseline_bytes: int
    reduced_precision: bool = False
    largest_fit: int = 0

    def required_bytes(self, size: Size, rows: int, keeps_scores: bool) -> int:
        """Bytes of an evaluation at this many rows, or of the decoder if it needs more.

        size: (width, height)
        keeps_scores: whether attention's score matrices are in memory
        """
        manifest = self.bundle.manifest
        names = [name for name in manifest.components if name.startswith(("unet", "vae_decoder"))]
        scratch = max(activation_bytes(manifest, name, size, rows) for name in names)
        scores = self._score_bytes(size) * rows if keeps_scores else 0
        overhead = OVERHEAD.get(self.backend, 1.0) / (2.0 if self.reduced_precision else 1.0)
        return int(overhead * scratch) + scores

    def _score_bytes(self, size: Size) -> int:
        """Bytes of one row's score matrix in the largest attention."""
        lengths = axis_lengths(self.bundle.manifest, size)
        shapes = attention_shapes(self.bundle.graph("unet"))
        counts = [
            heads * _axis_length(q, lengths) * _axis_length(k, lengths) for heads, q, k in shapes
        ]
        return SCORE_BYTES * max(counts, default=0)

    def free_bytes(self) -> int | None:
        """Free bytes, with those that earlier calls left in the process."""
        free = free_bytes(self.gpu)
        if free is None or self.gpu:
            return free
        return free + max(0, resident_bytes() - self.baseline_bytes)

    def max_images(self, size: Size, rows: int, limit: int, keeps_scores: bool) -> int:
        """How many images of this many rows each fit at once, up to a limit.

        Raises:
            UsageError: Not even one fits.
        """
        free = self.free_bytes()
        if free is None:
            return limit
        for count in range(limit, 0, -1):
            needed = self.required_bytes(size, count * rows, keeps_scores)
            if needed <= max(free, self.largest_fit):
                self.largest_fit = max(self.largest_fit, needed if self.gpu else 0)
                return count
        raise UsageError(
            f"{size[0]}x{size[1]} needs about {format_bytes(needed)} of memory on {self.backend} "
            f"in addition to the weights; {format_bytes(free)} are free",
            hint="choose a smaller size",
        )


def format_bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


@lru_cache(maxsize=8)
def attention_shapes(graph: Path) -> tuple[tuple[int, str | int, str | int], ...]:
    """Heads, queries and keys of every attention of a graph; axes as the exporter named them."""
    return tuple(_attention_shapes(graph))


def _attention_shapes(graph: Path) -> Iterator[tuple[int, str | int, str | int]]:
    nodes, shapes = graph_values(graph)
    for kind, inputs in nodes:
        if kind == "Attention" and len(inputs) > 1:
            query, key = (shapes.get(name, ()) for name in inputs[:2])
            if len(query) == len(key) == 4 and isinstance(query[1], int):
                yield query[1], query[2], key[2]


def _axis_length(axis: str | int, lengths: Mapping[str, int]) -> int:
    """1 for an unknown axis: the estimate stays a lower bound."""
    try:
        return axis if isinstance(axis, int) else evaluate_axis(axis, lengths)
    except ValueError:
        return 1
