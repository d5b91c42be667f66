"""Noise from a seed, as torch samples it, without torch.

- `CpuNoise`: `torch.Generator("cpu")`. Mersenne Twister (Matsumoto and Nishimura 1998) through the
  Box-Muller transform, in torch's order.
- `CudaNoise`: `torch.Generator("cuda")`. Philox4x32-10 (Salmon et al. 2011), one counter per
  element.

Both equal torch's numbers to float32 rounding; each call continues where the last one stopped.
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
    """The noise of a seed.

    Args:
        seed: In [0, 2**64).
        rng: "cpu" or "cuda", whose noise torch would sample.

    Raises:
        UsageError: For another rng.
    """
    if rng not in STREAMS:
        raise UsageError(f"rng {rng!r}; expected {' or '.join(STREAMS)}")
    return STREAMS[rng](seed)


def randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """The first numbers of a seed, float32, as `torch.randn` returns them on the CPU."""
    return CpuNoise(seed).randn(shape)


class _NoEntropy(np.random.SeedSequence):
    """A state that a seed replaces: gathering entropy would take five times as long as all else."""

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> np.ndarray:
        return np.zeros(n_words, dtype)


class CpuNoise:
    """`torch.Generator("cpu").manual_seed(seed)` under `torch.randn`."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.RandomState(np.random.MT19937(_NoEntropy(0)))
        self._bits.seed(seed & 0xFFFFFFFF)  # as torch seeds
        self._cached: float | None = None

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        if size < BLOCK:
            return np.array([self._next_normal() for _ in range(size)], np.float32).reshape(shape)
        tail = BLOCK if size % BLOCK else 0
        uniform = self._next_uniform(size + tail)
        full_blocks = size - size % BLOCK
        values = np.empty(size, np.float32)
        values[:full_blocks] = _normal_from_uniform(uniform[:full_blocks])
        if tail:  # torch samples the last 16 again when the size is not a multiple of 16
            values[-BLOCK:] = _normal_from_uniform(uniform[size:])
        return values.reshape(shape)

    def _next_uniform(self, count: int) -> np.ndarray:
        """[count] float32 in [0, 1), of the low 24 bits of each 32-bit word."""
        raw = self._next_integers(count) & np.uint32(0xFFFFFF)
        return raw.astype(np.float32) * np.float32(2.0**-24)

    def _next_integers(self, count: int) -> np.ndarray:
        return self._bits.randint(0, 2**32, count, np.uint32)

    def _next_normal(self) -> float:
        """One number in double precision; they come in pairs, so the second one is cached."""
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        words = [int(word) for word in self._next_integers(4)]
        angle_uniform, radius_uniform = (
            ((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (words[:2], words[2:])
        )
        radius, angle = math.sqrt(-2.0 * math.log1p(-radius_uniform)), 2.0 * math.pi * angle_uniform
        self._cached = radius * math.sin(angle)
        return radius * math.cos(angle)


def _normal_from_uniform(uniform: np.ndarray) -> np.ndarray:
    """Box-Muller of blocks of 16: the first eight numbers are radii, the last eight angles."""
    blocks = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log1p(-blocks[:, 0]))
    angle = np.float32(2.0 * np.pi) * blocks[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both.reshape(-1)


class CudaNoise:
    """`torch.Generator("cuda").manual_seed(seed)` under `torch.randn`.

    Element i is the first of the four normals of counter (call, 0, i). That holds while a GPU
    starts one thread per element, which the smallest GPUs in use do up to 2**16 elements. Larger
    noise would depend on the GPU, so it is refused.
    """

    MAX_ELEMENTS = 2**16

    def __init__(self, seed: int) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        self._calls = 0

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        if size > self.MAX_ELEMENTS:
            raise UsageError(
                f"rng cuda with {size} numbers at once: beyond {self.MAX_ELEMENTS} they depend on "
                "the GPU",
                hint="pass rng='cpu', or a smaller size",
            )
        index = np.arange(size, dtype=np.uint64)
        first, second = _philox(self._calls, index, self._key)
        self._calls += 1
        radius_uniform = first.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
        angle_scale = np.float32(2.0**-32 * 2.0 * np.pi)
        angle = second.astype(np.float32) * angle_scale + angle_scale / np.float32(2.0)
        values: np.ndarray = np.sqrt(np.float32(-2.0) * np.log(radius_uniform)) * np.sin(angle)
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
