"""Inputs like others, and wrong: bytes flipped, doubled, cut, and values of JSON inside replaced.

Knows JSON, and JSON behind the eight bytes of its length as safetensors has it; not what reads it.
"""

import json
import math
import random
from typing import Any

PASTED = b"\n%%%%\n"  # between the files of a target that reads several
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan),
    *("", "a", "1", "null", "x" * 200, "\ud800", "\0", "../a", "/etc/passwd", "%n", "F32", "é" * 9),
    *([], {}, [[]], [0], [None], {"a": 0}, [0] * 50, [1, "a", None, 0.5]),
)
WORDS = (
    *(
        b"<|endoftext|>",
        b"<|startoftext|>",
        b"BREAK",
        b"(",
        b")",
        b"[",
        b"]",
        b":1.3)",
        b"\\",
        b"'s",
    ),
    *(
        b"\xff",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x98\x80",
        b"\xcc\x81",
        b"\xe2\x80\xa8",
        b"\x00",
        b"\x1f",
    ),
    *(
        b"\xc4\xb0",
        b"\xef\xac\x81",
        b"\xc2\xbd",
        b"\xd9\xa3",
        b"&amp;",
        b"\n",
        b" ",
        b"x",
        b"9" * 30,
    ),
    *(b"\r\n", b'"', b"{}", b"[[[[", b"1e999", b"-0", b"inf", b"nan", b"Steps: 1", b"--", b"%%%%"),
)


def mutated(data: bytes, rng: random.Random, longest: int) -> bytes:
    """One more of its kind, of at most `longest` bytes."""
    head, middle, tail = _one_part(data, rng)
    if rng.random() < 0.7 and (changed := _in_json(middle, rng)) is not None:
        middle = changed
    else:
        for _ in range(rng.randint(1, 3)):
            middle = _in_bytes(middle, rng)
    return (head + middle + tail)[:longest]


def _one_part(data: bytes, rng: random.Random) -> tuple[bytes, bytes, bytes]:
    parts = data.split(PASTED)
    i = rng.randrange(len(parts))
    before = b"".join(part + PASTED for part in parts[:i])
    after = b"".join(PASTED + part for part in parts[i + 1 :])
    return before, parts[i], after


def _in_json(data: bytes, rng: random.Random) -> bytes | None:
    """The same with one value of its JSON changed; None if it holds none."""
    for behind in (0, 8):
        end = int.from_bytes(data[:8], "little") + 8 if behind else len(data)
        try:
            value = json.loads(data[behind:end])
        except (ValueError, RecursionError):
            continue
        text = json.dumps(_changed(value, rng), separators=rng.choice(((",", ":"), (", ", ": "))))
        result = text.encode("ascii")
        return len(result).to_bytes(8, "little") + result + data[end:] if behind else result
    return None


def _changed(value: Any, rng: random.Random) -> Any:
    """A copy with one value somewhere replaced, dropped, doubled or moved."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        if rng.random() < 0.75:
            return {**value, key: _changed(value[key], rng)}
        other = rng.choice((*value, "a", "__pad.0", "", "../a"))
        if rng.random() < 0.4:
            return {name: item for name, item in value.items() if name != key}
        return {**value, other: value[key]}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [
            *value[:i],
            *rng.choice(([_changed(value[i], rng)], [], [value[i]] * 2)),
            *value[i + 1 :],
        ]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 8, -8, value, 1 << rng.randrange(40)))
    if isinstance(value, str) and rng.random() < 0.5:
        return _in_bytes(value.encode("utf-8", "replace"), rng).decode("utf-8", "replace")
    return rng.choice(ODD)


def _in_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.randrange(1, 9))
    way = rng.randrange(6)
    if way == 0:
        return data[:at] + rng.choice(WORDS) + data[at:]
    if way == 1:
        return data[:at] + data[to:]
    if way == 2:
        return data[:to] + data[at:]
    if way == 3:
        return data[:at] + rng.randbytes(to - at) + data[to:]
    if way == 4:
        return data[:at] + rng.choice(WORDS) * rng.randrange(1, 40) + data[to:]
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at:to]) + data[to:]
