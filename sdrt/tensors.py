"""Safetensors files as numpy arrays, mapped into memory, bfloat16 included.

Knows the file's format and numpy; not what the tensors are for. The `safetensors` package gives
numpy no bfloat16, which many LoRA files are in.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import SdrtError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MOST_HEADER = 100_000_000  # bytes, as the format has it


class Tensors(Mapping[str, np.ndarray]):
    """A file's tensors by name, each read when it is asked for; bfloat16 comes as float32."""

    def __init__(self, path: Path) -> None:
        """Raises SdrtError if the file is not a whole safetensors file."""
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
            length = int.from_bytes(self._bytes[:8].tobytes(), "little")
            if not 2 <= length <= min(MOST_HEADER, len(self._bytes) - 8):
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(self._bytes[8 : 8 + length].tobytes())
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._start = 8 + length
            self._records = {name: record for name, record in header.items()}
            ends = [int(record["data_offsets"][1]) for record in header.values()]
            if self._start + max(ends, default=0) > len(self._bytes):
                raise ValueError("it ends too soon")
        except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise SdrtError(
                f"{path} is not a whole safetensors file: {error}; fetch it again"
            ) from error
        self._path = path

    def __getitem__(self, name: str) -> np.ndarray:
        record = self._records[name]
        low, high = record["data_offsets"]
        raw = np.asarray(self._bytes[self._start + low : self._start + high])
        if record["dtype"] == "BF16":
            return (
                (raw.view(np.uint16).astype(np.uint32) << 16)
                .view(np.float32)
                .reshape(record["shape"])
            )
        if record["dtype"] not in DTYPES:
            raise SdrtError(f"{self._path}: {name} is {record['dtype']}, which is not read")
        return raw.view(DTYPES[record["dtype"]]).reshape(record["shape"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._records[name]["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
