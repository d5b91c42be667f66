"""Safetensors files that lie: what is refused here, and that the package itself agrees."""

import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from safetensors.torch import save_file as save_torch
from untrusted_input import safetensors_bytes

from sdrt.bundle.safetensors import MAX_HEADER, WIDTHS, Tensors, read_header
from sdrt.errors import CheckpointError, SdrtError


def entry(low, high, shape=(4,), dtype="U8", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [low, high], **more}


A, B = entry(0, 4), entry(4, 8)
TWICE = b'{"a":%b,"a":%b}' % (json.dumps(A).encode(), json.dumps(B).encode())
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
LIES = {
    "an empty file": (b"", "a header of 0 bytes"),
    "no header": (b"\0" * 8, "a header of 0 bytes"),
    "a header beyond the file": ((1000).to_bytes(8, "little") + b"{}", "of 1000 bytes"),
    "a header of 2**64 - 1": (b"\xff" * 8 + b"{}", "is not a safetensors file"),
    "a header over 100 MB": ((MAX_HEADER + 1).to_bytes(8, "little"), "is not a safetensors file"),
    "text that is not UTF-8": (safetensors_bytes(b'{"\xff":{}}'), "utf-8"),
    "a list": (safetensors_bytes(b"[]"), "begins with"),
    "a space first": (safetensors_bytes(b" {}"), "begins with"),
    "cut JSON": (safetensors_bytes(b'{"a"'), "not a complete"),
    "brackets without end": (safetensors_bytes(DEEP), "nested too deeply"),
    "a name twice": (safetensors_bytes(TWICE, b"x" * 8), "'a' comes twice"),
    "a record that is none": (safetensors_bytes({"a": 7}), "expected an object"),
    "an unknown field": (safetensors_bytes({"a": entry(0, 4, x=1)}, b"x" * 4), "unknown fields"),
    "a lost field": (safetensors_bytes({"a": {"dtype": "U8", "shape": [0]}}), "lacks"),
    "an unknown dtype": (safetensors_bytes({"a": entry(0, 4, dtype="X8")}, b"x" * 4), "X8"),
    "a negative axis": (safetensors_bytes({"a": entry(0, 4, (-4,))}, b"x" * 4), "is -4"),
    "an axis of 4.0": (safetensors_bytes({"a": entry(0, 4, (4.0,))}, b"x" * 4), r"is 4\.0"),
    "an axis of truth": (safetensors_bytes({"a": entry(0, 1, (True,))}, b"x"), "is True"),
    "a product over 2**64": (
        safetensors_bytes({"a": entry(0, 4, (2**32, 2**32, 2**32))}, b"x" * 4),
        "its shape 79228162514264337593543950336",
    ),
    "a thousand axes": (safetensors_bytes({"a": entry(0, 1, [1] * 1000)}, b"x"), "0 to 16"),
    "a shape of another length": (safetensors_bytes({"a": entry(0, 4, (3,))}, b"x" * 4), "shape 3"),
    "a dtype of another width": (
        safetensors_bytes({"a": entry(0, 4, dtype="F32")}, b"x" * 4),
        "its shape 16",
    ),
    "offsets the wrong way round": (safetensors_bytes({"a": entry(4, 0)}, b"x" * 4), "expected"),
    "offsets beyond the file": (safetensors_bytes({"a": entry(0, 400, (400,))}), "end at"),
    "negative offsets": (safetensors_bytes({"a": entry(-4, 0)}, b"x" * 4), "is -4"),
    "an overlap": (safetensors_bytes({"a": A, "b": entry(2, 6)}, b"x" * 6), "begin at 4"),
    "a hole": (safetensors_bytes({"a": A, "b": entry(5, 9)}, b"x" * 9), "begin at 4"),
    "bytes after the last": (safetensors_bytes({"a": A}, b"x" * 5), "end at"),
    "a byte too few": (safetensors_bytes({"a": A}, b"x" * 3), "end at"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "expected text"),
    "metadata in a list": (safetensors_bytes({"__metadata__": []}), "an object"),
}


@pytest.mark.parametrize(("data", "message"), LIES.values(), ids=LIES)
def test_files_that_lie(tmp_path, data, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(SdrtError, match=message):
        Tensors(path)
    with pytest.raises(CheckpointError):
        read_header(path, CheckpointError)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == data


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "none", "."):
        with pytest.raises(SdrtError, match="is missing" if name == "none" else "not a complete"):
            Tensors(tmp_path / name)


def test_whole_files_are_read(tmp_path):
    arrays = {"b": np.eye(3, dtype=np.float16), "a": np.zeros((0, 7), np.int64), "c": np.ones(())}
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(arrays, {"who": "x" * 5000}))
    actual = Tensors(path)
    assert actual.metadata == {"who": "x" * 5000} and set(actual) == set(arrays)
    for name, array in arrays.items():
        assert actual[name].dtype == array.dtype and np.array_equal(actual[name], array)
    path.write_bytes(safetensors_bytes(b"{}   "))
    assert not len(Tensors(path))


def test_float8_is_as_torch_reads_it(tmp_path):
    """All 256 values of both kinds, NaN and infinity among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    kinds = {"a": torch.float8_e4m3fn, "b": torch.float8_e5m2}
    saved = {name: codes.view(kind).clone() for name, kind in kinds.items()}
    save_torch(saved, tmp_path / "a.safetensors")
    actual = Tensors(tmp_path / "a.safetensors")
    for name, kind in kinds.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(actual[name], codes.view(kind).float().numpy())


def accepted_there(path):
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def test_the_package_agrees(tmp_path):
    """On files that are whole or nearly: it accepts the same ones, and finds the same in them."""
    rng = random.Random(0)
    path = tmp_path / "a.safetensors"
    accepted = 0
    for _ in range(500):
        at, header = 0, {}
        for name in "abc"[: rng.randint(0, 3)]:
            dtype, shape = (
                rng.choice([*WIDTHS]),
                [rng.randint(0, 3) for _ in range(rng.randint(0, 3))],
            )
            length = int(np.prod(shape)) * WIDTHS[dtype]
            header[name], at = entry(at, at + length, shape, dtype), at + length
        data = bytearray(safetensors_bytes(header, bytes(at)))
        for _ in range(rng.choice([0, 0, 1, 2])):
            data[rng.randrange(len(data))] = rng.choice(b'0123456789{}[]:," \xff\x00ab')
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))] + bytes(rng.randrange(3))
        path.write_bytes(data)
        try:
            tensors = Tensors(path)
            here = {name: tensors.shape(name) for name in tensors}
        except SdrtError:
            here = None
        accepted += here is not None
        assert here == accepted_there(path), data
    assert accepted > 100
