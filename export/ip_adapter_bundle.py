"""`sdrt build --ip-adapter`: from an adapter and its image encoder to a validated bundle.

Knows the order of the work, files and folders; the networks are `ip_adapter.py`'s. A bundle serves
every base model of its family.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdrt.atomic_files import publish_folder
from sdrt.bundle.embedded import MODELS
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import (
    IMAGE_ENCODER,
    IP_ADAPTER,
    IP_ADAPTER_KV,
    MANIFEST,
    Component,
    Manifest,
    json_from_manifest,
)
from sdrt.bundle.store import bundles_folder
from sdrt.errors import CheckpointError, UsageError
from sdrt.runtime.noise import randn
from sdrt.runtime.reference_outputs import (
    REFERENCE_FILE,
    ReferenceOutputs,
    reference_outputs_to_json,
)

from .graph import OPSET
from .ip_adapter import (
    ImageEncoder,
    IpAdapter,
    IpAdapterConfig,
    build_ip_adapter,
    read_image_encoder_config,
)
from .modules import load_weights
from .recipes import Recipe
from .reference import Case, TorchReference
from .safety_checker import renamed
from .validation import Validator, select_validation_backend
from .weights import PICKLES, TO_CONVERT, read_json, read_safetensors, weight_files

log = logging.getLogger("sdrt.build")
Load = Callable[[], Any]
EMBEDDED = "likeness"  # the IP-Adapter of the embedded model


@dataclass(frozen=True, slots=True)
class IpAdapterBuildPlan:
    """The arguments of `sdrt build --ip-adapter`.

    ip_adapter: the adapter's weights, `.safetensors`; or the embedded one's name
    image_encoder: the folder of the encoder that it was trained with, in transformers' layout
    name: None for the file's
    """

    ip_adapter: Path
    image_encoder: Path | None
    output: Path | None = None
    name: str | None = None
    dtype: str = "float32"
    backend: str = "auto"
    force: bool = False


def build_ip_adapter_bundle(plan: IpAdapterBuildPlan) -> Path:
    """Build, validate and publish the bundle of an IP-Adapter.

    Returns:
        The bundle's folder.

    Raises:
        CheckpointError: The files cannot be read, or do not fit each other.
        ParityError: An engine's outputs differ too much from torch's.
        BackendError: The backend is not available.
        BundleError: The folder exists already.
        UsageError: No image encoder.
    """
    file, encoder = _find_files(plan)
    candidate = select_validation_backend(plan.backend)
    config = _load_adapter(file).config
    parts = _find_parts(file, encoder, config)
    name = plan.name or plan.ip_adapter.stem + ("-fp16" if plan.dtype == "float16" else "")
    target = (plan.output or bundles_folder() / name).expanduser()
    with publish_folder(target, MANIFEST, plan.force) as folder:
        log.info("building %s from %s, validating on %s", target, plan.ip_adapter, candidate.label)
        manifest = _initial_manifest(plan, name, config)
        validator = Validator(manifest, folder, plan.dtype, candidate)
        components: dict[str, Component] = {}
        for load, recipe in parts:
            log.info("%s: load, export, validate", recipe.name)
            components |= validator.build_component(load, recipe)
        outputs = ReferenceOutputs(validator.reference.samples, [])
        (folder / REFERENCE_FILE).write_text(reference_outputs_to_json(outputs))
        manifest = replace(manifest, components=components, files=describe_files(folder))
        (folder / MANIFEST).write_text(json_from_manifest(manifest))
    return target


def _find_files(plan: IpAdapterBuildPlan) -> tuple[Path, Path]:
    """The adapter's file, and its image encoder's folder."""
    if str(plan.ip_adapter) == EMBEDDED and plan.image_encoder is None:
        folder = MODELS / EMBEDDED
        return folder / "ip_adapter.safetensors", folder / "image_encoder"
    if plan.image_encoder is None:
        raise UsageError(
            "an IP-Adapter reads images through an image encoder",
            hint="add --image-encoder FOLDER, such as models/image_encoder of h94/IP-Adapter",
        )
    return plan.ip_adapter, plan.image_encoder


def _find_parts(file: Path, encoder: Path, config: IpAdapterConfig) -> list[tuple[Load, Recipe]]:
    """Image encoder and adapter, each with what loads it."""
    load_adapter = partial(_load_adapter, file)
    encoder_config = read_image_encoder_config(read_json(encoder / "config.json"), config)
    side, width = int(encoder_config.image_size), config.embedding
    positions = (side // encoder_config.patch_size) ** 2 + 1
    image = (1, positions, width) if config.reads_hidden_states else (1, width)
    load_encoder = partial(_load_encoder, encoder, encoder_config, config)
    return [
        (load_encoder, _recipe(IMAGE_ENCODER, "pixels", (1, 3, side, side), "image")),
        (load_adapter, _recipe(IP_ADAPTER, "image", image, IP_ADAPTER_KV)),
    ]


def _recipe(name: str, source: str, shape: tuple[int, ...], output: str) -> Recipe:
    """Of a network with one input and one output."""

    def compute(_: TorchReference, module: Any) -> list[Case]:
        example = randn(0, shape)
        return [Case({source: example}, {output: module(torch.from_numpy(example)).numpy()})]

    return Recipe(name, lambda *_: None, compute, (output,), {source: {0: "rows"}})


def _initial_manifest(plan: IpAdapterBuildPlan, name: str, config: IpAdapterConfig) -> Manifest:
    """The manifest without what is known only once the components are built."""
    encoder = f", image encoder {plan.image_encoder}" if plan.image_encoder else ""
    return Manifest(
        name=name,
        source=f"{plan.ip_adapter}{encoder}",
        sizes=((224, 224),),
        batch=(1, 1, 4),
        latent_channels=4,
        downscale=8,
        max_tokens=0,
        opset=OPSET,
        components={},
        parity={},
        preview=(),
        files={},
        family=f"IP-Adapter for a context of {config.context}",
    )


def _load_adapter(file: Path) -> IpAdapter:
    if file.suffix in PICKLES:
        raise CheckpointError(f"{file} is a pickle: {TO_CONVERT}")
    return build_ip_adapter(read_safetensors(file))


def _load_encoder(folder: Path, encoder_config: Any, config: IpAdapterConfig) -> ImageEncoder:
    from transformers import CLIPVisionModelWithProjection

    with torch.device("meta"):
        model: Any = CLIPVisionModelWithProjection(encoder_config)
    embeddings = model.vision_model.embeddings  # the positions are no weight
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        weights |= read_safetensors(path)
    named = renamed(weights, set(model.state_dict()))
    loaded = load_weights(model, named, "image_encoder")
    return ImageEncoder(loaded, hidden_states=config.reads_hidden_states).eval()
