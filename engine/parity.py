"""The gate: what an engine computes against what torch, or the bundle's own graph, computes.

Knows floors, engines and profiles; not which backend compiled an engine. Below a floor nothing is
published, and a plan is not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.bundle import Bundle
from sdrt.errors import ParityError

from .plans import Plan, Profile


@dataclass(frozen=True, slots=True)
class ParityThresholds:
    """The worst that is let through.

    cosine: least cosine of the angle between both outputs
    error: most absolute difference, as a share of the reference's largest value
    psnr: least peak signal-to-noise ratio of pictures in [-1, 1], dB
    """

    cosine: float
    error: float
    psnr: float


PARITY_THRESHOLDS = {
    "float32": ParityThresholds(cosine=0.999999, error=1e-3, psnr=60.0),
    "float16": ParityThresholds(cosine=0.999, error=5e-2, psnr=30.0),
}

# Least PSNR in dB of a guided picture in a lower precision against the exact one.
MIN_IMAGE_PSNR = 35.0


def measure(found: np.ndarray, wanted: np.ndarray, *, is_image: bool) -> dict[str, float]:
    """Cosine, largest relative error and, for pictures, PSNR; NaN anywhere makes them NaN."""
    a, b = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    scale = float(np.abs(b).max()) or 1.0
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(not a.any() and not b.any())
    values = {"cosine": cosine, "error": float(np.abs(a - b).max()) / scale}
    if is_image:
        mean = float(np.mean((np.clip(a, -1, 1) - np.clip(b, -1, 1)) ** 2))
        values["psnr"] = (
            10 * float(np.log10(4.0 / mean)) if mean > 1e-20 else (200.0 if mean == mean else mean)
        )
    return values


def check(name: str, values: Mapping[str, float], dtype: str) -> None:
    """Raise ParityError, naming component, measure, found and wanted, below the dtype's floor."""
    floor = PARITY_THRESHOLDS[dtype]
    good = {
        "cosine": (values["cosine"] >= floor.cosine, f"at least {floor.cosine}"),
        "error": (values["error"] <= floor.error, f"at most {floor.error}"),
    }
    if "psnr" in values:
        good["psnr"] = (values["psnr"] >= floor.psnr, f"at least {floor.psnr} dB")
    for measure, (passed, wanted) in good.items():
        if not passed:
            raise ParityError(
                f"{name} differs from torch: {measure} {values[measure]:.6g}, wanted {wanted}; "
                "nothing was published. "
                + ("Build with --fp32." if dtype == "float16" else "Report this model.")
            )


def worst_case(every: list[dict[str, float]]) -> dict[str, float]:
    """The worst value of each measure over several runs."""
    keys = every[0]
    return {
        key: float((np.max if key == "error" else np.min)([run[key] for run in every]))
        for key in keys
    }


def validate_plan(bundle: Bundle, name: str, engine: Any, plan: Plan) -> None:
    """Let a plan's engine pass, or close it. What was compared once is kept in the plan's sidecar.

    Raises ParityError if it computes something else than the bundle's graph, BackendError if it
    cannot be called.
    """
    try:
        if plan.parity is None:
            plan = plan.with_parity(compare_with_cpu(bundle, name, engine, plan.key.profiles))
        check(name, plan.parity or {}, bundle.manifest.components[name].dtype)
    except BaseException:
        engine.close()
        raise


def compare_with_cpu(
    bundle: Bundle, name: str, engine: Any, profiles: tuple[Profile, ...]
) -> dict[str, float]:
    """How an engine compares with ONNX Runtime on the CPU, at the usual shape of every profile."""
    from .onnxruntime.cpu import OrtEngine

    component = bundle.manifest.components[name]
    exact = OrtEngine(name, bundle.graph(name), component)
    every = []
    for profile in profiles:
        feeds = {
            spec.name: sample_input(spec.dtype, profile[spec.name][1]) for spec in engine.inputs
        }
        wanted, found = exact(feeds), engine(feeds)
        every += [
            measure(found[spec.name], wanted[spec.name], is_image=name == "vae_decoder")
            for spec in engine.outputs
        ]
    exact.close()
    return worst_case(every)


def sample_input(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Something to feed: small whole numbers, timesteps from 1 to 999, or normal noise."""
    rng = np.random.default_rng(0)
    if dtype.startswith("int"):
        return rng.integers(0, 16, shape).astype(dtype)
    if len(shape) == 1:
        return np.linspace(999, 1, shape[0], dtype=dtype)
    return rng.normal(size=shape).astype(dtype)
