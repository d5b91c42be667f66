"""Starting noise: the numbers of `torch.Generator("cpu").manual_seed(seed)` and `torch.randn`.

Mersenne Twister (Matsumoto and Nishimura 1998) through Box and Muller's transform, in the order in
which torch walks its blocks of sixteen; equal to torch's to float32 rounding.
"""

import numpy as np

BLOCK = 16


def randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of the given shape, of at least 16 elements; seed in [0, 2**64)."""
    size = int(np.prod(shape))
    if size < BLOCK:
        raise ValueError(f"noise of {size} elements; at least {BLOCK} are needed")
    tail = BLOCK if size % BLOCK else 0
    uniform = _uniform(seed, size + tail)
    whole = size - size % BLOCK
    values = np.empty(size, np.float32)
    values[:whole] = _normal_from_uniform(uniform[:whole])
    if tail:  # torch draws the last sixteen anew when the size is no multiple of sixteen
        values[-BLOCK:] = _normal_from_uniform(uniform[size:])
    return values.reshape(shape)


def _uniform(seed: int, count: int) -> np.ndarray:
    """[count] float32 in [0, 1): the low 24 bits of each 32-bit draw."""
    bits = np.random.MT19937()
    bits.state = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)  # type: ignore[assignment]
    raw = bits.random_raw(count) & 0xFFFFFF
    return raw.astype(np.float32) * np.float32(2.0**-24)


def _normal_from_uniform(uniform: np.ndarray) -> np.ndarray:
    """Each block's first eight numbers give radii, its last eight angles."""
    blocks = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log1p(-blocks[:, 0]))
    angle = np.float32(2.0 * np.pi) * blocks[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both.reshape(-1)
