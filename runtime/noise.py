"""Noise by seed, as torch draws it, without torch.

`CpuNoise` gives the numbers of `torch.Generator("cpu")`: Mersenne Twister (Matsumoto and Nishimura
1998) through Box and Muller's transform, in torch's order. `CudaNoise` gives those of
`torch.Generator("cuda")`: Philox4x32-10 (Salmon et al. 2011), one counter an element. Both equal
torch's to float32 rounding, and go on where the last call ended.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from sdrt.errors import UsageError

BLOCK = 16


class Noise(Protocol):
    """A stream of standard normal numbers."""

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next float32 numbers, in the given shape."""
        ...


def noise_from_seed(seed: int, rng: str = "cpu") -> Noise:
    """The stream of a seed in [0, 2**64); rng is "cpu" or "cuda", else UsageError."""
    if rng not in STREAMS:
        raise UsageError(f"rng {rng!r}; expected {' or '.join(STREAMS)}")
    return STREAMS[rng](seed)


def randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """The first numbers of a seed, as `torch.randn` gives them on the CPU."""
    return CpuNoise(seed).randn(shape)


class _NoEntropy(np.random.SeedSequence):
    """A state that a seed replaces; gathering one takes five times as long as all the rest."""

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> np.ndarray:
        return np.zeros(n_words, dtype)


class CpuNoise:
    """`torch.Generator("cpu").manual_seed(seed)` under `torch.randn`."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.RandomState(np.random.MT19937(_NoEntropy(0)))
        self._bits.seed(seed & 0xFFFFFFFF)  # as torch seeds
        self._kept: float | None = None

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        if size < BLOCK:
            return np.array([self._one() for _ in range(size)], np.float32).reshape(shape)
        tail = BLOCK if size % BLOCK else 0
        uniform = self._uniform(size + tail)
        whole = size - size % BLOCK
        values = np.empty(size, np.float32)
        values[:whole] = _normal_from_uniform(uniform[:whole])
        if tail:  # torch draws the last sixteen anew when the size is no multiple of sixteen
            values[-BLOCK:] = _normal_from_uniform(uniform[size:])
        return values.reshape(shape)

    def _uniform(self, count: int) -> np.ndarray:
        """[count] float32 in [0, 1): the low 24 bits of each 32-bit draw."""
        raw = self._draws(count) & np.uint32(0xFFFFFF)
        return raw.astype(np.float32) * np.float32(2.0**-24)

    def _draws(self, count: int) -> np.ndarray:
        return self._bits.randint(0, 2**32, count, np.uint32)

    def _one(self) -> float:
        """One number in double precision; they come in pairs, and the second is kept."""
        if self._kept is not None:
            value, self._kept = self._kept, None
            return value
        draws = [int(draw) for draw in self._draws(4)]
        turn, share = (
            ((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (draws[:2], draws[2:])
        )
        radius, angle = math.sqrt(-2.0 * math.log1p(-share)), 2.0 * math.pi * turn
        self._kept = radius * math.sin(angle)
        return radius * math.cos(angle)


def _normal_from_uniform(uniform: np.ndarray) -> np.ndarray:
    """Each block's first eight numbers give radii, its last eight angles."""
    blocks = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log1p(-blocks[:, 0]))
    angle = np.float32(2.0 * np.pi) * blocks[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both.reshape(-1)


class CudaNoise:
    """`torch.Generator("cuda").manual_seed(seed)` under `torch.randn`.

    Element i is the first of the four normals that counter (call, 0, i) makes. That holds while a
    GPU starts one thread an element, which the smallest of those in use do to 2**16 elements;
    larger noise would depend on the GPU it came from and is refused.
    """

    MOST = 2**16

    def __init__(self, seed: int) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        self._calls = 0

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        if size > self.MOST:
            raise UsageError(
                f"rng cuda with {size} numbers at once; torch's depend on the GPU beyond "
                f"{self.MOST}. Use rng cpu, or a smaller size"
            )
        index = np.arange(size, dtype=np.uint64)
        first, second = _philox(self._calls, index, self._key)
        self._calls += 1
        share = first.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
        turn = np.float32(2.0**-32 * 2.0 * np.pi)
        angle = second.astype(np.float32) * turn + turn / np.float32(2.0)
        values: np.ndarray = np.sqrt(np.float32(-2.0) * np.log(share)) * np.sin(angle)
        return values.reshape(shape)


def _philox(call: int, index: np.ndarray, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The first two of four 32-bit words of ten Philox rounds at counters (call, 0, index)."""
    low = np.uint64(0xFFFFFFFF)
    words = [np.full_like(index, call & 0xFFFFFFFF), np.full_like(index, call >> 32)]
    words += [index & low, index >> np.uint64(32)]
    keys = [np.uint64(k) for k in key]
    for _ in range(10):
        product = np.uint64(0xD2511F53) * words[0], np.uint64(0xCD9E8D57) * words[2]
        words = [
            (product[1] >> np.uint64(32)) ^ words[1] ^ keys[0],
            product[1] & low,
            (product[0] >> np.uint64(32)) ^ words[3] ^ keys[1],
            product[0] & low,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    return words[0], words[1]


STREAMS: dict[str, type[CpuNoise] | type[CudaNoise]] = {"cpu": CpuNoise, "cuda": CudaNoise}
