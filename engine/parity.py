"""Parity: an engine's outputs compared with those of torch, or of the bundle's own graph.

Knows thresholds, engines and profiles; not which backend compiled an engine. What misses a
threshold is not published, and a plan is not used.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import Bundle
from sdrt.bundle.graph_weights import read_graph_weights
from sdrt.bundle.manifest import WEIGHTS
from sdrt.bundle.safetensors import Tensors
from sdrt.errors import ParityError

from .plans import Plan, Profile


@dataclass(frozen=True, slots=True)
class ParityThresholds:
    """The thresholds of one precision.

    Attributes:
        cosine: Minimum cosine similarity of both outputs.
        error: Maximum absolute difference, relative to the reference's largest value.
        psnr: Minimum peak signal-to-noise ratio of images in [-1, 1], dB.
    """

    cosine: float
    error: float
    psnr: float


PARITY_THRESHOLDS = {
    "float32": ParityThresholds(cosine=0.999999, error=1e-3, psnr=60.0),
    "float16": ParityThresholds(cosine=0.999, error=5e-2, psnr=30.0),
}

# Minimum PSNR in dB of a guided image in a lower precision against the exact one.
MIN_IMAGE_PSNR = 35.0
MAX_CHANGED = 256_000_000  # bytes of weights that are replaced while a plan is validated


def measure(actual: np.ndarray, expected: np.ndarray, *, is_image: bool) -> dict[str, float]:
    """Cosine, largest relative error and, for images, PSNR; NaN anywhere makes them NaN."""
    a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
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
    """Raise ParityError, with measure, value and threshold, where a dtype's threshold is missed."""
    floor = PARITY_THRESHOLDS[dtype]
    good = {
        "cosine": (values["cosine"] >= floor.cosine, f"at least {floor.cosine}"),
        "error": (values["error"] <= floor.error, f"at most {floor.error}"),
    }
    if "psnr" in values:
        good["psnr"] = (values["psnr"] >= floor.psnr, f"at least {floor.psnr} dB")
    for measure, (passed, expected) in good.items():
        if not passed:
            raise ParityError(
                f"{name} differs from torch: {measure} {values[measure]:.6g}, wanted {expected}; "
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
    """Validate a plan's engine, or close it. The result is stored in the plan's sidecar: a plan is
    compared once.

    Raises ParityError if it computes something else than the bundle's graph, BackendError if it
    cannot be called.
    """
    try:
        if plan.parity is None:
            profiles = plan.key.profiles
            every = [compare_with_cpu(bundle, name, engine, profiles)]
            if plan.key.refittable:
                changed = change_weights(bundle.graph(name))
                every.append(compare_with_cpu(bundle, name, engine, profiles, changed))
            plan = plan.with_parity(worst_case(every))
        check(name, plan.parity or {}, bundle.manifest.components[name].dtype)
    except BaseException:
        engine.close()
        raise


def change_weights(graph: Path) -> dict[str, np.ndarray]:
    """Other weights for a graph's layers: its own with 30 % of noise, up to `MAX_CHANGED`."""
    stored, changed, size = Tensors(graph.with_name(WEIGHTS)), dict[str, np.ndarray](), 0
    layers = read_graph_weights(graph).layers
    for name in sorted(layers, key=lambda name: hashlib.sha256(name.encode()).digest()):
        weights = stored[name]
        if (size := size + weights.nbytes) > MAX_CHANGED and changed:
            break
        noise = np.random.default_rng(len(changed)).normal(1.0, 0.3, weights.shape)
        changed[name] = (weights * noise.astype(np.float32)).astype(weights.dtype)
    return changed


def compare_with_cpu(
    bundle: Bundle,
    name: str,
    engine: Any,
    profiles: tuple[Profile, ...],
    weights: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """Compare an engine with ONNX Runtime on the CPU, at the optimum shape of every profile.

    weights: both compute with these instead of the stored ones; afterwards the engine has its own
    """
    from .onnxruntime.cpu import OrtEngine

    component = bundle.manifest.components[name]
    exact = OrtEngine(name, bundle.graph(name), component)
    if weights:
        exact.refit(weights)
        engine.refit(weights)
    every = []
    for profile in profiles:
        feeds = {
            spec.name: sample_input(spec.dtype, profile[spec.name][1]) for spec in engine.inputs
        }
        expected, actual = exact(feeds), engine(feeds)
        every += [
            measure(actual[spec.name], expected[spec.name], is_image=name == "vae_decoder")
            for spec in engine.outputs
        ]
    exact.close()
    if weights:
        engine.refit({})
    return worst_case(every)


def sample_input(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An input: small integers, timesteps from 999 to 1, or normal noise."""
    rng = np.random.default_rng(0)
    if dtype.startswith("int"):
        return rng.integers(0, 16, shape).astype(dtype)
    if len(shape) == 1:
        return np.linspace(999, 1, shape[0], dtype=dtype)
    return rng.normal(size=shape).astype(dtype)
