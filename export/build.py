"""`sdrt build`: from a checkpoint to a proven bundle that appears whole or not at all."""

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sdrt.atomic_files import published
from sdrt.bundle import Bundle
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import MANIFEST, Component, Manifest, json_from_manifest
from sdrt.bundle.store import bundles_folder
from sdrt.engine import Candidate, GpuInventory, select_backend
from sdrt.errors import SdrtError, UsageError
from sdrt.runtime.reference_outputs import REFERENCE_FILE, reference_outputs_to_json

from .activation_memory import max_batch_images
from .checkpoint import Checkpoint, find_checkpoint
from .graph import OPSET
from .modules import (
    check_branch,
    check_fit,
    latent_shape,
    native_size,
    unet_config,
)
from .single_file.parts import OPTIONS
from .text_encoder import prompt_length
from .tokenizer import CheckpointTokenizer
from .validation import RECIPES, Proof
from .weights import TOKENIZERS

log = logging.getLogger("sdrt.build")


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What `sdrt build` was asked for. batch: None for as many pictures at once as fit"""

    model: str
    output: Path | None = None
    dtype: str = "float32"
    sizes: tuple[tuple[int, int], ...] = ()
    batch: tuple[int, int, int] | None = (1, 1, 4)
    backend: str = "auto"
    force: bool = False
    vae: str | None = None
    unet: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None
    prediction_type: str | None = None
    zero_snr: bool = False
    loras: tuple[str, ...] = ()
    revision: str | None = None
    safety_checker: bool = False
    feature_reuse: int | None = None


def build_bundle(plan: BuildPlan) -> Path:
    """Build, prove and publish; returns the bundle's folder.

    Raises CheckpointError, ParityError, BackendError, and BundleError where the folder is taken.
    """
    # The proof runs on the CPU unless asked otherwise, so that a bundle does not depend on the GPU
    # that was near, and there on ONNX Runtime: it needs the least memory.
    hidden = (
        GpuInventory(unavailable_reason="bundles are proven on the CPU")
        if plan.backend == "auto"
        else None
    )
    candidate = select_backend(plan.backend, size=0, machine=hidden)
    parts = {part: getattr(plan, part) for part in OPTIONS}
    checkpoint = find_checkpoint(plan.model, plan.revision, plan.safety_checker, parts)
    checkpoint = checkpoint.with_prediction(plan.prediction_type, plan.zero_snr)
    checkpoint = checkpoint.with_loras(plan.loras)
    check_fit(checkpoint)
    check_branch(checkpoint, plan.feature_reuse)
    target = (plan.output or bundles_folder() / checkpoint.name).expanduser()
    with published(target, MANIFEST, plan.force) as folder:
        began = time.monotonic()
        _announce(checkpoint, plan, target)
        log.info("proving on %s (%s)", candidate.title, candidate.because)
        manifest = _make(checkpoint, plan, candidate, folder)
    size = sum(record.size for record in manifest.files.values())
    log.info("done in %.0f s, %.1f MB", time.monotonic() - began, size / 1e6)
    return target


def _announce(checkpoint: Checkpoint, plan: BuildPlan, target: Path) -> None:
    """Say what will be done; raise SdrtError if the disk cannot hold it."""
    more = "; --safety-checker adds the checkpoint's" if checkpoint.has_safety_checker else ""
    log.info("safety checker: %s", "on" if checkpoint.safety_checker else f"off{more}")
    width, height = native_size(checkpoint)
    log.info("predicts %s; native size %dx%d", checkpoint.prediction, width, height)
    for line in checkpoint.passed_over():
        log.debug("passed over keys that shape nothing: %s", line)
    needed = _bytes(checkpoint, plan.dtype)
    free = shutil.disk_usage(target.parent).free
    log.info(
        "building %s from %s: %s, about %.0f MB",
        target,
        checkpoint.source,
        plan.dtype,
        needed / 1e6,
    )
    if needed > free:
        raise SdrtError(
            f"{target} needs about {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
            "free some, or name another --output or SDRT_HOME"
        )


def _bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """About how large the bundle will be."""
    return checkpoint.parameters() * (2 if dtype == "float16" else 4)


def _make(checkpoint: Checkpoint, plan: BuildPlan, candidate: Candidate, folder: Path) -> Manifest:
    tokenizers = checkpoint.tokenizers()
    max_tokens = prompt_length(checkpoint, tokenizers)
    _copy_small_files(checkpoint, tokenizers, folder)
    latent_channels, downscale = latent_shape(checkpoint)
    manifest = Manifest(
        name=checkpoint.name,
        source=checkpoint.source,
        sizes=plan.sizes or (native_size(checkpoint),),
        batch=plan.batch or (1, 1, 1),
        latent_channels=latent_channels,
        downscale=downscale,
        max_tokens=max_tokens,
        opset=OPSET,
        components={},
        parity={},
        preview=(),
        files={},
        multiple=downscale * 2 ** (len(unet_config(checkpoint).block_out_channels) - 1),
        zero_empty_prompt=checkpoint.zeroes_empty_prompt(),
        prediction=str(checkpoint.prediction),
    )
    _check_sizes(manifest)
    proof = Proof(manifest, folder, plan.dtype, candidate, plan.feature_reuse)
    components: dict[str, Component] = {}
    recipes = [recipe for recipe in RECIPES if recipe.part in checkpoint.parts]
    for number, recipe in enumerate(recipes, 1):
        log.info("[%d/%d] %s: read, export, prove", number, len(recipes), recipe.name)
        components |= proof.components(checkpoint, recipe)
    manifest = replace(manifest, components=components)
    end_to_end = proof.end_to_end(manifest)
    (folder / REFERENCE_FILE).write_text(reference_outputs_to_json(proof.answers))
    manifest = replace(
        manifest,
        parity=end_to_end,
        preview=proof.preview,
        files=describe_files(folder),
        admitted=proof.admitted(manifest),
    )
    if plan.batch is None:
        most = max_batch_images(Bundle(folder, manifest), candidate)
        manifest = replace(manifest, batch=(1, 1, most))
    (folder / MANIFEST).write_text(json_from_manifest(manifest))
    return manifest


def _check_sizes(manifest: Manifest) -> None:
    for width, height in manifest.sizes:
        if width % manifest.multiple or height % manifest.multiple:
            raise UsageError(
                f"size {width}x{height}; this model's pictures have sides that are multiples of "
                f"{manifest.multiple}"
            )


def _copy_small_files(
    checkpoint: Checkpoint, tokenizers: Mapping[str, CheckpointTokenizer], folder: Path
) -> None:
    (folder / "scheduler").mkdir()
    text = json.dumps(checkpoint.scheduler_config(), indent=2, sort_keys=True) + "\n"
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    for part, tokenizer in tokenizers.items():
        tokenizer.write(folder / TOKENIZERS[part])
