"""A compiled component against the bundle's own graph, which the build proved: the gate that a plan
passes before it is used, and what the gate is fed.

Knows engines and profiles; not which backend compiled it.
"""

from typing import Any

import numpy as np

from sdrt.bundle import Bundle

from . import parity
from .plans import Plan, Profile


def prove(bundle: Bundle, name: str, engine: Any, plan: Plan) -> None:
    """Let a plan's engine pass, or close it. What was compared once is kept in the plan's sidecar.

    Raises ParityError if it computes something else than the bundle's graph, BackendError if it
    cannot be called.
    """
    try:
        if plan.parity is None:
            plan = plan.with_parity(compared(bundle, name, engine, plan.key.profiles))
        parity.check(name, plan.parity or {}, bundle.manifest.components[name].dtype)
    except BaseException:
        engine.close()
        raise


def compared(
    bundle: Bundle, name: str, engine: Any, profiles: tuple[Profile, ...]
) -> dict[str, float]:
    """How an engine compares with ONNX Runtime on the CPU, at the usual shape of every profile."""
    from .onnxruntime.cpu import OrtEngine

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
