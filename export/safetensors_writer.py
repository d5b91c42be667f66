"""Writing one safetensors file whose tensors all begin at a multiple of 256 bytes.

CUDA kernels want aligned weights, and ONNX initializers point straight into this file. The format
forbids holes, so the header is padded with spaces and the gaps are tensors called `__pad.N`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdrt.bundle.manifest import NAMES

ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: name, safetensors dtype, shape, length in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


def offsets(entries: Iterable[Entry]) -> tuple[bytes, list[int]]:
    """The file's head, its length field included, and where each tensor begins in the file."""
    header: dict[str, Mapping[str, object]] = {"__metadata__": NAMES}
    starts, at, pads = [], 0, 0
    for entry in entries:
        if gap := -at % ALIGNMENT:
            header[f"__pad.{pads}"] = _record("U8", (gap,), at, gap)
            pads, at = pads + 1, at + gap
        header[entry.name] = _record(entry.dtype, entry.shape, at, entry.length)
        starts.append(at)
        at += entry.length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + start for start in starts]


def _record(dtype: str, shape: tuple[int, ...], at: int, length: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + length]}


def write_safetensors(path: Path, entries: list[Entry], arrays: Iterator[np.ndarray]) -> list[int]:
    """Write the arrays, in the entries' order, one in memory at a time; returns their offsets."""
    head, starts = offsets(entries)
    with path.open("wb") as file:
        file.write(head)
        for start, array in zip(starts, arrays, strict=True):
            file.write(bytes(start - file.tell()))
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return starts
