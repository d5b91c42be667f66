"""From a bundle to a component on TensorRT: its plan found or built, loaded or shared, and proven.

Knows plans and loaded plans; not what is run with them. Never run on a GPU yet.
"""

from typing import Any

import numpy as np

from sdrt.bundle import Bundle

from . import parity
from .cuda import device_of
from .gpus import Gpu
from .plans import Profile
from .trt_engine import Loaded, TrtEngine, TrtUnet, loaded_plans, loading
from .trt_plans import PlanOptions, trt_plan


def load_engine(
    bundle: Bundle, name: str, kind: str, gpu: Gpu, stream: int = 0, *, streamed: bool = False
) -> TrtEngine:
    """A component on a GPU: its plan found or built, loaded or shared, and proven once.

    stream: the caller's own, by its address; 0 for the device's

    Raises BackendError, and ParityError if it computes something else than the bundle's graph.
    """
    component = bundle.manifest.components[name]
    plan = trt_plan(bundle, name, kind, gpu, PlanOptions(streamed=streamed))
    mark = (str(plan.path), plan.sha256, gpu.index)
    with loading:
        if mark not in loaded_plans:
            loaded_plans[mark] = Loaded(plan, component, bundle.graph(name), device_of(gpu.index))
        if name == "unet":
            engine: TrtEngine = TrtUnet(name, component, loaded_plans[mark], gpu.sm, stream)
        else:
            engine = TrtEngine(name, component, loaded_plans[mark], stream)
    try:
        if plan.parity is None:
            plan = plan.with_parity(compared(bundle, name, engine, plan.key.profiles))
        parity.check(name, plan.parity or {}, component.dtype)
    except BaseException:
        engine.close()
        raise
    return engine


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
