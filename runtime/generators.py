"""Random generators of other libraries, as diffusers' pipelines accept them, as seeds.

Knows how torch's and NumPy's generators look; imports neither torch nor what it would reproduce.
"""

import sys
from typing import Any, Protocol

import numpy as np

from sdrt.errors import UsageError

from .noise import STREAMS
from .parsing import invalid_argument

EXPECTED = "a torch.Generator, a numpy.random.Generator, an integer, or a list of them"


class TorchGenerator(Protocol):
    """What `torch.Generator` has."""

    @property
    def device(self) -> Any: ...

    def initial_seed(self) -> int: ...


GeneratorLike = TorchGenerator | np.random.Generator | int


def seed_from_generator(generator: object) -> tuple[int | tuple[int, ...], str | None]:
    """The seeds of a generator, or of one for each image.

    - `torch.Generator().manual_seed(n)` is the seed n of one image, on "cuda" with torch's noise of
      a GPU. It is advanced, as diffusers advances it, so a second call must seed it again.
    - `numpy.random.Generator` samples the seed of the first image; the next ones count on.
    - An integer is a seed.

    Args:
        generator: One, or a list with one for each image.

    Returns:
        The option `seed`, and the option `rng` where a torch generator decides it.

    Raises:
        UsageError: For other objects, for a torch generator that was used since it was seeded, and
            for a list of generators on different devices.
    """
    if not isinstance(generator, list | tuple):
        seed, rng = _seed_from_one(generator)
        # One torch generator is one image: diffusers would sample all images from it as one tensor.
        return ((seed,) if rng else seed), rng
    seeds = [_seed_from_one(one) for one in generator]
    if not seeds:
        raise invalid_argument("generator", generator, EXPECTED)
    rngs = {rng for _, rng in seeds if rng}
    if len(rngs) > 1:
        raise UsageError("generator has devices of several kinds", hint="use one kind of device")
    return tuple(seed for seed, _ in seeds), next(iter(rngs), None)


def _seed_from_one(generator: object) -> tuple[int, str | None]:
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**32)), None
    if isinstance(generator, int | np.integer) and not isinstance(generator, bool):
        return int(generator), None
    if not all(hasattr(generator, name) for name in ("initial_seed", "get_state", "device")):
        raise invalid_argument("generator", generator, EXPECTED)
    return _seed_from_torch(generator)


def _seed_from_torch(generator: Any) -> tuple[int, str]:
    """The seed and the kind of noise of a torch generator, which is advanced."""
    kind, seed = generator.device.type, int(generator.initial_seed())
    if kind not in STREAMS:
        raise UsageError(
            f"generator is on {kind}; expected {' or '.join(STREAMS)}",
            hint='pass torch.Generator("cpu").manual_seed(n), or seed=n',
        )
    fresh = type(generator)(device=generator.device)
    fresh.manual_seed(seed)
    if fresh.get_state().tolist() != generator.get_state().tolist():
        raise UsageError(
            "generator was used since it was seeded, so its noise cannot be reproduced",
            hint="call generator.manual_seed(n) before every call, or pass seed=n",
        )
    sys.modules["torch"].randn(1, generator=generator, device=generator.device)
    return seed, kind
