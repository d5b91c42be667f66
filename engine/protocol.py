"""What a backend is: an `Engine` that runs a component and a `History` that combines latents.

Knows numpy. Everything that crosses this line is a numpy array; where the bytes live meanwhile
is the backend's own business.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sdrt.bundle.manifest import TensorSpec
from sdrt.errors import UsageError

Feeds = Mapping[str, np.ndarray]


class Engine(Protocol):
    """One compiled component."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; any number of threads may call at the same time. The arrays returned are the
        caller's own: no other call writes to them.
        """
        ...

    def refit(self, weights: Feeds) -> None:
        """Compute with these in place of the stored weights of these names, of their shapes and
        dtypes, and with the stored ones for all others, whatever was given before.

        Raises BackendError if the backend does not take them.
        """
        ...

    def close(self) -> None:
        """Give the memory back; the engine cannot be called again."""
        ...


def check_feeds(name: str, specs: tuple[TensorSpec, ...], feeds: Feeds) -> dict[str, np.ndarray]:
    """The feeds as contiguous arrays of the declared dtypes; raises UsageError where they misfit.

    A named axis must have one length in all inputs of the call.
    """
    axes: dict[str, int] = {}
    ready = {}
    if unknown := set(feeds) - {spec.name for spec in specs}:
        raise UsageError(f"{name} has no input {', '.join(sorted(unknown))}")
    for spec in specs:
        if spec.name not in feeds:
            raise UsageError(f"{name} was not given its input {spec.name}")
        array = feeds[spec.name]
        if len(array.shape) != len(spec.shape) or not all(
            length == (axes.setdefault(axis, length) if isinstance(axis, str) else axis)
            for axis, length in zip(spec.shape, array.shape, strict=True)
        ):
            raise UsageError(
                f"{name}: {spec.name} is {list(array.shape)}, expected {list(spec.shape)}"
            )
        ready[spec.name] = np.ascontiguousarray(array, dtype=spec.dtype)
    return ready
