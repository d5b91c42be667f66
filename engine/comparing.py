"""A compiled component against the bundle's own graph, which the build proved: what the parity gate
of plans is fed.

Knows engines and profiles; not which backend compiled it.
"""

from typing import Any

import numpy as np

from sdrt.bundle import Bundle

from . import parity
from .plans import Profile


def compared(
    bundle: Bundle, name: str, engine: Any, profiles: tuple[Profile, ...]
) -> dict[str, float]:
    """How an engine compares with ONNX Runtime on the CPU, at the usual shape of every profile."""
    from .ort import OrtEngine

    component = bundle.manifest.components[name]
    exact = OrtEngine(name, bundle.graph(name), component)
    every = []
    for profile in profiles:
        feeds = {spec.name: sample_of(spec.dtype, profile[spec.name][1]) for spec in engine.inputs}
        wanted, found = exact(feeds), engine(feeds)
        every += [
            parity.measures(found[spec.name], wanted[spec.name], picture=name == "vae_decoder")
            for spec in engine.outputs
        ]
    exact.close()
    return parity.worst(every)


def sample_of(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Something to feed: small whole numbers, timesteps from 1 to 999, or normal noise."""
    rng = np.random.default_rng(0)
    if dtype.startswith("int"):
        return rng.integers(0, 16, shape).astype(dtype)
    if len(shape) == 1:
        return np.linspace(999, 1, shape[0], dtype=dtype)
    return rng.normal(size=shape).astype(dtype)
