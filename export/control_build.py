"""`sdrt build --controlnet`: from a ControlNet or T2I-Adapter to a validated control bundle.

Knows the order of the work and what the nets read and put out; graphs and comparisons are other
modules'. A control bundle holds one component and serves every bundle of its family.
"""

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdrt.atomic_files import publish_folder
from sdrt.bundle import Bundle
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import (
    ADAPTER_STATE,
    CONTROL_IMAGE,
    DOWN_RESIDUAL,
    MANIFEST,
    MID_RESIDUAL,
    Manifest,
    json_from_manifest,
)
from sdrt.bundle.store import bundles_folder
from sdrt.engine import Candidate, Feeds, list_backends
from sdrt.runtime import GenerationOptions
from sdrt.runtime.reference_outputs import (
    REFERENCE_FILE,
    TIMESTEP,
    ReferenceOutputs,
    component_inputs,
    reference_outputs_to_json,
)
from sdrt.runtime.text.conditioning import build_time_ids

from .control_checkpoint import ControlCheckpoint, find_control_checkpoint
from .graph import OPSET
from .recipes import LATENT_AXES, Recipe
from .reference import Case, TorchReference
from .t2i_adapter import T2IAdapterConfig
from .validation import Validator, select_validation_backend

log = logging.getLogger("sdrt.build")
TOKENS = 77  # of a prompt, as the text encoders of all families read it
AXES = {
    "sample": LATENT_AXES,
    "context": {0: "rows", 1: "tokens"},
    **{name: {0: "rows"} for name in ("timestep", "pooled", "time_ids")},
}
# dB, of a reduced precision's residuals. At 27 dB their noise was 46 dB below the UNet's output, to
# which the UNet's own bfloat16 adds noise at 35 dB.
MIN_SNR = 20.0
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ControlBuildPlan:
    """The arguments of `sdrt build --controlnet`.

    name: None for the net's
    sizes: of the images that it is validated with; by default those of its family
    """

    controlnet: str
    output: Path | None = None
    name: str | None = None
    dtype: str = "float32"
    sizes: tuple[Size, ...] = ()
    batch: tuple[int, int, int] = (1, 1, 4)
    backend: str = "auto"
    force: bool = False
    revision: str | None = None


def build_control_bundle(plan: ControlBuildPlan) -> Path:
    """Build, validate and publish a control bundle.

    Returns:
        The bundle's folder.

    Raises:
        CheckpointError: The net cannot be found, read or understood.
        ParityError: An engine's outputs differ too much from torch's.
        BackendError: The backend is not available.
        BundleError: The folder exists already.
    """
    candidate = select_validation_backend(plan.backend)
    checkpoint = find_control_checkpoint(plan.controlnet, plan.revision)
    name = plan.name or checkpoint.name + ("-fp16" if plan.dtype == "float16" else "")
    target = (plan.output or bundles_folder() / name).expanduser()
    with publish_folder(target, MANIFEST, plan.force) as folder:
        began = time.monotonic()
        log.info("building %s from %s, for %s", target, checkpoint.source, checkpoint.family)
        log.info("validating on %s", candidate.label)
        manifest = _build(checkpoint, plan, name, candidate, folder)
    size = sum(record.size for record in manifest.files.values())
    log.info("done in %.0f s, %.1f MB", time.monotonic() - began, size / 1e6)
    return target


def _build(
    checkpoint: ControlCheckpoint,
    plan: ControlBuildPlan,
    name: str,
    candidate: Candidate,
    folder: Path,
) -> Manifest:
    manifest = _initial_manifest(checkpoint, plan, name)
    validator = Validator(manifest, folder, plan.dtype, candidate)
    recipe = control_recipe(checkpoint)
    log.info("%s: load, export, validate", recipe.name)
    components = validator.build_component(checkpoint.load, recipe)
    manifest = replace(manifest, components=components)
    outputs = ReferenceOutputs(validator.reference.samples, [])
    (folder / REFERENCE_FILE).write_text(reference_outputs_to_json(outputs))
    manifest = replace(
        manifest,
        parity=components[recipe.name].parity,
        files=describe_files(folder),
        admitted=_allowed_precisions(folder, manifest),
    )
    (folder / MANIFEST).write_text(json_from_manifest(manifest))
    return manifest


def _initial_manifest(checkpoint: ControlCheckpoint, plan: ControlBuildPlan, name: str) -> Manifest:
    """The manifest without what is known only once the component is built."""
    return Manifest(
        name=name,
        source=checkpoint.source,
        sizes=plan.sizes or (checkpoint.native_size,),
        batch=plan.batch,
        latent_channels=checkpoint.latent_channels,
        downscale=checkpoint.downscale,
        max_tokens=TOKENS,
        opset=OPSET,
        components={},
        parity={},
        preview=(),
        files={},
        multiple=checkpoint.size_multiple,
        family=checkpoint.family,
    )


def control_recipe(checkpoint: ControlCheckpoint) -> Recipe:
    """How the component of a control bundle is built."""
    config, scale = checkpoint.config, checkpoint.downscale
    image_axes = {0: "rows", 2: f"{scale}*latent_height", 3: f"{scale}*latent_width"}
    if isinstance(config, T2IAdapterConfig):
        outputs = tuple(f"{ADAPTER_STATE}_{i}" for i in range(config.num_maps))
    else:
        skips = config.unet.skip_shapes(8, 8)
        outputs = (*(f"{DOWN_RESIDUAL}_{i}" for i in range(len(skips))), MID_RESIDUAL)
    return Recipe(
        checkpoint.kind,
        lambda *_: checkpoint.load(),
        partial(_reference_cases, checkpoint),
        outputs,
        {**AXES, CONTROL_IMAGE: image_axes},
    )


def _reference_cases(
    checkpoint: ControlCheckpoint, reference: TorchReference, module: Any
) -> list[Case]:
    """A case for every size: noise, and a control image of hard edges."""
    outputs = control_recipe(checkpoint).outputs
    cases = []
    for seed, size in enumerate(reference.manifest.sizes):
        inputs = _example_inputs(checkpoint, size, seed)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        values = (value.numpy() for value in module(**tensors))
        cases.append(Case(inputs, dict(zip(outputs, values, strict=True))))
    return cases


def _example_inputs(checkpoint: ControlCheckpoint, size: Size, seed: int) -> Feeds:
    width, height = size
    rng = np.random.default_rng(seed)
    blocks = rng.random((1, 3, height // 4 + 1, width // 4 + 1)) < 0.2
    edges = blocks.repeat(4, 2).repeat(4, 3)[:, :, :height, :width].astype(np.float32)
    if isinstance(checkpoint.config, T2IAdapterConfig):
        return {CONTROL_IMAGE: edges}
    unet, scale = checkpoint.config.unet, checkpoint.downscale
    shapes: dict[str, tuple[int, ...]] = {
        "sample": (1, unet.in_channels, height // scale, width // scale)
    }
    if unet.attends:
        shapes["context"] = (1, TOKENS, unet.cross_attention_dim)
    if unet.pooled_width:
        shapes["pooled"] = (1, unet.pooled_width)
    inputs = {name: rng.normal(size=of).astype(np.float32) for name, of in shapes.items()}
    inputs |= {"timestep": np.full(1, TIMESTEP, np.float32), CONTROL_IMAGE: edges}
    if unet.pooled_width:
        inputs["time_ids"] = build_time_ids(GenerationOptions(), size)[1:]
    return inputs


def _allowed_precisions(folder: Path, manifest: Manifest) -> dict[str, float]:
    """The reduced precisions of this machine whose residuals are close enough to the exact ones,
    with the ratio of signal to noise in dB.
    """
    allowed: dict[str, float] = {}
    bundle = Bundle(folder, manifest)
    for candidate in list_backends():
        name = candidate.reduced_precision
        if candidate.unavailable_reason is None and name is not None:
            exact = _outputs(candidate, bundle)
            admitted = replace(manifest, admitted={name: 0.0})
            reduced = _outputs(candidate, replace(bundle, manifest=admitted))
            snr = min(_signal_to_noise(reduced[key], exact[key]) for key in exact)
            close = snr >= MIN_SNR
            log.info(
                "%s: signal to noise %.1f dB, %s", name, snr, "allowed" if close else "too low"
            )
            if close:
                allowed[name] = round(snr, 2)
    return allowed


def _outputs(candidate: Candidate, bundle: Bundle) -> Feeds:
    """The component's outputs for the reference inputs."""
    name = bundle.manifest.control_net
    assert candidate.load is not None and name is not None
    engine = candidate.load(bundle, name)
    try:
        return engine(component_inputs(bundle.manifest, name))
    finally:
        engine.close()


def _signal_to_noise(actual: np.ndarray, exact: np.ndarray) -> float:
    """In dB; at most 200."""
    signal, noise = (float(np.square(a, dtype=np.float64).sum()) for a in (exact, actual - exact))
    return 200.0 if noise <= 1e-20 * signal else float(10 * np.log10(max(signal, 1e-30) / noise))
