"""Safetensors files as numpy arrays, mapped into memory, bfloat16 and float8 included.

Knows the file's format and numpy; not what the tensors are for. Every header passes here before
any other library sees the file: a file is whole, or it is refused. The `safetensors` package gives
numpy no bfloat16 and no float8, which many LoRA files are in.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.errors import BundleError, SdrtError
from sdrt.json_validation import array, integer, json_object, mapping, one_of, record, shorten, text

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Bytes of an element; more are known to the format than are read here.
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
WIDTHS |= {"I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
WIDTHS |= {"F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
MAX_HEADER = 100_000_000  # bytes, as the format has it
MAX_AXES = 16


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What a header says of one tensor: `data_offsets` are bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors, in the order of their bytes. start: where the first byte of data is"""

    records: Mapping[str, TensorRecord]
    metadata: Mapping[str, str]
    start: int


_RECORD = record(
    TensorRecord,
    {
        "dtype": one_of(WIDTHS),
        "shape": array(integer(0, 2**48), 0, MAX_AXES),
        "data_offsets": array(integer(0, 2**48), 2, 2),
    },
)
DOWNLOAD_AGAIN = "download it again"
REBUILD = "copy the bundle again, or run `sdrt build` again with --force"
NOT_SAFETENSORS = "pass a .safetensors file"
_ANY = text(r"[\s\S]*", "text")
_METADATA = mapping(_ANY, _ANY, 10_000)


def read_header(path: Path, error_class: type[SdrtError] = SdrtError) -> Header:
    """Raises the error unless the file is a whole safetensors file: a header of at most 100 MB that
    lies inside, no name twice, every tensor of the length of its shape, all side by side from the
    header to the end of the file without a hole or an overlap.
    """
    is_part_of_bundle = issubclass(error_class, BundleError)
    renew = REBUILD if is_part_of_bundle else DOWNLOAD_AGAIN
    try:
        if not path.is_file() and path.exists():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                named = path.suffix == ".safetensors" or is_part_of_bundle
                hint = renew if named else NOT_SAFETENSORS
                raise error_class(f"{path} is not a safetensors file", hint=hint)
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = _header(file.read(length), size)
    except FileNotFoundError as error:
        hint = renew if is_part_of_bundle else "check the path"
        raise error_class(f"{path} is missing", hint=hint) from error
    except (OSError, ValueError) as error:
        raise error_class(
            f"{path} is not a complete safetensors file: {error}", hint=renew
        ) from error
    return header


def _header(data: bytes, size: int) -> Header:
    if data[:1] != b"{":
        raise ValueError(f"a header that begins with {data[:1]!r}")
    raw: dict[str, Any] = json_object(data)
    metadata = _METADATA(raw.pop("__metadata__", {}), "its metadata")
    records = {name: _RECORD(value, shorten(name)) for name, value in raw.items()}
    ordered = sorted(records.items(), key=lambda item: item[1].data_offsets)
    end = 0
    for name, tensor in ordered:
        low, high = tensor.data_offsets
        if low != end or high < low:
            raise ValueError(f"{shorten(name)} lies at {low} to {high}, expected to begin at {end}")
        if (length := math.prod(tensor.shape) * WIDTHS[tensor.dtype]) != high - low:
            raise ValueError(f"{shorten(name)} has {high - low} bytes, its shape {length}")
        end = high
    start = 8 + len(data)
    if start + end != size:
        raise ValueError(f"it has {size} bytes, its tensors end at {start + end}")
    return Header(dict(ordered), metadata, start)


def _from_bfloat16(raw: np.ndarray) -> np.ndarray:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _from_float8_e5m2(raw: np.ndarray) -> np.ndarray:
    """The upper byte of a float16 (arXiv:2209.05433)."""
    return (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def _from_float8_e4m3(raw: np.ndarray) -> np.ndarray:
    """Without infinities, so that only a mantissa of ones is NaN (arXiv:2209.05433): a float16
    once shifted, but for an exponent that counts from 7 and not from 15.
    """
    bits = raw.astype(np.uint16)
    half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view(np.float16)
    return np.where(bits & 0x7F == 0x7F, np.float32(np.nan), half.astype(np.float32) * 256)


WIDENED = {
    "BF16": _from_bfloat16,
    "F8_E5M2": _from_float8_e5m2,
    "F8_E4M3": _from_float8_e4m3,
}


class Tensors(Mapping[str, np.ndarray]):
    """A file's tensors by name, each read when it is asked for; bfloat16 and float8 are returned as
    float32.
    """

    def __init__(self, path: Path) -> None:
        """Raises SdrtError if the file is not a whole safetensors file."""
        header = read_header(path)
        self.metadata = header.metadata
        self._path, self._start, self._records = path, header.start, header.records
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise SdrtError(f"{path} cannot be read: {error}") from error

    def __getitem__(self, name: str) -> np.ndarray:
        record = self._records[name]
        low, high = record.data_offsets
        raw = np.asarray(self._bytes[self._start + low : self._start + high])
        if record.dtype in WIDENED:
            return WIDENED[record.dtype](raw).reshape(record.shape)
        if record.dtype not in DTYPES:
            raise SdrtError(f"{self._path}: {name} is {record.dtype}, which is not read")
        return raw.view(DTYPES[record.dtype]).reshape(record.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._records[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
