"""`sdrt build`: from a checkpoint to a validated bundle, which is published atomically.

Knows the order of the work; configurations, graphs and comparisons are other modules'.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sdrt.atomic_files import publish_folder
from sdrt.bundle import Bundle
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import MANIFEST, Manifest, json_from_manifest
from sdrt.bundle.store import bundles_folder
from sdrt.engine import Candidate
from sdrt.errors import SdrtError, UsageError
from sdrt.runtime.parsing import int_parser
from sdrt.runtime.reference_outputs import REFERENCE_FILE, reference_outputs_to_json

from .activation_memory import max_batch_images
from .checkpoint import Checkpoint, find_checkpoint
from .graph import OPSET
from .model_spec import ModelSpec, check_feature_reuse, read_model_spec
from .progress import BuildProgress, compute_key
from .recipes import RECIPES
from .requirements import check_requirements
from .single_file.parts import OPTIONS
from .validation import Validator, select_validation_backend
from .weights import TOKENIZERS

log = logging.getLogger("sdrt.build")
LORA_RANK = int_parser(1, 256)


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The arguments of `sdrt build`.

    batch: None for as many images at once as fit
    name: None for the model's and how the build differs from the default one
    lora_rank: of the LoRA factors that every row of a batch may have of its own
    """

    model: str
    output: Path | None = None
    name: str | None = None
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
    lora_rank: int | None = None


def build_bundle(plan: BuildPlan) -> Path:
    """Build, validate and publish a bundle.

    Returns:
        The bundle's folder.

    Raises:
        CheckpointError: the model cannot be found, read or understood.
        ParityError: an engine's outputs differ too much from torch's.
        BackendError: the backend is not available.
        BundleError: the folder exists already.
        UsageError: an argument is out of range.
    """
    if plan.lora_rank is not None:
        LORA_RANK("lora_rank", plan.lora_rank)
    candidate = select_validation_backend(plan.backend)
    checkpoint = _find_checkpoint(plan)
    spec = read_model_spec(checkpoint)
    check_feature_reuse(spec, plan.feature_reuse)
    check_requirements(checkpoint, plan.sizes or (spec.native_size,), plan.dtype)
    target = (plan.output or bundles_folder() / _bundle_name(checkpoint, spec, plan)).expanduser()
    with publish_folder(target, MANIFEST, plan.force, resume=True) as folder:
        began = time.monotonic()
        _announce(checkpoint, spec, plan, target)
        log.info("validating on %s", candidate.label)
        manifest = _build(checkpoint, spec, plan, candidate, folder)
    size = sum(record.size for record in manifest.files.values())
    log.info("done in %.0f s, %.1f MB", time.monotonic() - began, size / 1e6)
    return target


def _find_checkpoint(plan: BuildPlan) -> Checkpoint:
    parts = {part: getattr(plan, part) for part in OPTIONS}
    checkpoint = find_checkpoint(plan.model, plan.revision, plan.safety_checker, parts)
    checkpoint = checkpoint.with_prediction(plan.prediction_type, plan.zero_snr)
    return checkpoint.with_loras(plan.loras)


def _bundle_name(checkpoint: Checkpoint, spec: ModelSpec, plan: BuildPlan) -> str:
    """The name asked for, else the model's and how the build differs from the default one."""
    if plan.name:
        return plan.name
    parts = [checkpoint.name]
    if plan.dtype == "float16":
        parts.append("fp16")
    parts += [Path(lora.rpartition(":")[0] or lora).stem for lora in plan.loras]
    if plan.vae:
        parts.append(Path(plan.vae).stem)
    if plan.sizes and plan.sizes != (spec.native_size,):
        parts += [f"{width}x{height}" for width, height in plan.sizes]
    return "-".join(parts)


def _announce(checkpoint: Checkpoint, spec: ModelSpec, plan: BuildPlan, target: Path) -> None:
    """Log what will be built; raise SdrtError if the disk cannot hold it."""
    more = "; --safety-checker adds the checkpoint's" if checkpoint.has_safety_checker else ""
    log.info("safety checker: %s", "on" if checkpoint.safety_checker else f"off{more}")
    width, height = spec.native_size
    log.info("predicts %s; native size %dx%d", spec.prediction, width, height)
    for line in checkpoint.passed_over():
        log.debug("ignored keys without effect: %s", line)
    needed = _estimate_bytes(checkpoint, plan.dtype)
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
            f"{target} needs about {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free",
            hint="free some space, or set --output or SDRT_HOME to another disk",
        )


def _estimate_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """About how large the bundle will be."""
    return checkpoint.parameters() * (2 if dtype == "float16" else 4)


def _build(
    checkpoint: Checkpoint, spec: ModelSpec, plan: BuildPlan, candidate: Candidate, folder: Path
) -> Manifest:
    manifest = _initial_manifest(checkpoint, spec, plan)
    _check_sizes(manifest)
    validator = Validator(
        manifest, folder, plan.dtype, candidate, plan.feature_reuse, plan.lora_rank
    )
    progress = BuildProgress(folder, _compute_key(checkpoint, plan, candidate, manifest))
    progress.restore(validator.reference)
    _write_settings(spec, folder)
    recipes = [recipe for recipe in RECIPES if recipe.part in checkpoint.parts]
    for number, recipe in enumerate(recipes, 1):
        done = progress.has(recipe.name)
        work = "reused" if done else "load, export, validate"
        log.info("[%d/%d] %s: %s", number, len(recipes), recipe.name, work)
        if not done:
            components = validator.build_component(partial(recipe.load, checkpoint, spec), recipe)
            progress.save(recipe.name, components, validator.reference)
    manifest = replace(manifest, components=progress.components)
    parity = validator.validate_pipeline(manifest)
    (folder / REFERENCE_FILE).write_text(reference_outputs_to_json(validator.reference.outputs))
    manifest = replace(
        manifest,
        parity=parity,
        preview=validator.reference.preview,
        files=describe_files(folder),
        admitted=validator.find_allowed_precisions(manifest),
    )
    if plan.batch is None:
        max_images = max_batch_images(Bundle(folder, manifest), candidate)
        manifest = replace(manifest, batch=(1, 1, max_images))
    (folder / MANIFEST).write_text(json_from_manifest(manifest))
    progress.clear()
    return manifest


def _compute_key(
    checkpoint: Checkpoint, plan: BuildPlan, candidate: Candidate, manifest: Manifest
) -> str:
    """Of what decides about the components."""
    settings = {
        "dtype": plan.dtype,
        "sizes": manifest.sizes,
        "feature_reuse": plan.feature_reuse,
        "lora_rank": plan.lora_rank,
        "backend": candidate.title,
    }
    return compute_key(checkpoint, plan.loras, settings)


def _initial_manifest(checkpoint: Checkpoint, spec: ModelSpec, plan: BuildPlan) -> Manifest:
    """The manifest without what is known only once the components are built."""
    return Manifest(
        name=_bundle_name(checkpoint, spec, plan),
        source=checkpoint.source,
        sizes=plan.sizes or (spec.native_size,),
        batch=plan.batch or (1, 1, 1),
        latent_channels=spec.latent_channels,
        downscale=spec.downscale,
        max_tokens=spec.max_tokens,
        opset=OPSET,
        components={},
        parity={},
        preview=(),
        files={},
        multiple=spec.size_multiple,
        zero_empty_prompt=spec.zero_empty_prompt,
        prediction=str(spec.prediction),
    )


def _check_sizes(manifest: Manifest) -> None:
    for width, height in manifest.sizes:
        if width % manifest.multiple or height % manifest.multiple:
            raise UsageError(
                f"unsupported size {width}x{height}: this model's image sides are multiples of "
                f"{manifest.multiple}"
            )


def _write_settings(spec: ModelSpec, folder: Path) -> None:
    """The scheduler's configuration and the tokenizers."""
    (folder / "scheduler").mkdir()
    text = json.dumps(spec.scheduler, indent=2, sort_keys=True) + "\n"
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    for part, tokenizer in spec.tokenizers.items():
        tokenizer.write(folder / TOKENIZERS[part])
