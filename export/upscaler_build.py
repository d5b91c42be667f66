"""`sdrt build --upscaler`: from the weights of an ESRGAN to a validated bundle of one component.

Knows the order of the work; the network and its layouts are `esrgan.py`'s.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sdrt.atomic_files import publish_folder
from sdrt.bundle import Bundle
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import MANIFEST, UPSCALER, Component, Manifest, json_from_manifest
from sdrt.bundle.store import bundles_folder
from sdrt.engine import Candidate, parity
from sdrt.errors import CheckpointError
from sdrt.runtime.reference_outputs import (
    REFERENCE_FILE,
    ReferenceOutputs,
    reference_outputs_to_json,
)

from .activation_memory import alive_bytes
from .esrgan import RrdbNet, load_rrdb
from .graph import OPSET, export_graph
from .hub import HUB_ID, fetch_single_file
from .reference import TorchReference
from .validation import select_validation_backend
from .weights import PICKLES, read_safetensors

log = logging.getLogger("sdrt.build")
MULTIPLE = 2  # pixels: some networks put 2 x 2 of them into channels
TILE = 128  # pixels of a side that are enlarged at once
AXES = {"image": {0: "rows", 2: "height", 3: "width"}}
TO_CONVERT = (
    'it may run code when read. Convert it where you trust it: python -c "import torch, '
    "safetensors.torch as s; w = torch.load('FILE', weights_only=True); "
    "w = w.get('params_ema', w.get('params', w)); "
    "s.save_file({k: v.contiguous() for k, v in w.items()}, 'FILE.safetensors')\""
)


@dataclass(frozen=True, slots=True)
class UpscalerBuildPlan:
    """The arguments of `sdrt build --upscaler`. name: None for the file's"""

    upscaler: str
    output: Path | None = None
    name: str | None = None
    dtype: str = "float32"
    backend: str = "auto"
    force: bool = False
    revision: str | None = None


def build_upscaler_bundle(plan: UpscalerBuildPlan) -> Path:
    """Build, validate and publish an upscaler's bundle.

    Returns:
        The bundle's folder.

    Raises:
        CheckpointError: The weights cannot be found, read or understood.
        ParityError: The engine's output differs too much from torch's.
        BundleError: The folder exists already.
    """
    candidate = select_validation_backend(plan.backend)
    path = find_upscaler_file(plan.upscaler, plan.revision)
    net = load_rrdb(read_safetensors(path), str(path))
    suffix = "-fp16" if plan.dtype == "float16" else ""
    name = plan.name or f"{path.stem}{suffix}"
    target = (plan.output or bundles_folder() / name).expanduser()
    with publish_folder(target, MANIFEST, plan.force) as folder:
        log.info("building %s from %s, scale %d", target, path, net.config.scale)
        manifest = _initial_manifest(name, plan, net.config.scale)
        _write_reference(net, manifest, folder)
        component = _build_component(net, manifest, plan.dtype, candidate, folder)
        manifest = replace(
            manifest,
            components={UPSCALER: component},
            parity=component.parity,
            files=describe_files(folder),
        )
        (folder / MANIFEST).write_text(json_from_manifest(manifest))
    return target


def find_upscaler_file(where: str, revision: str | None = None) -> Path:
    """The safetensors file of a path, a folder or a repository on the hub.

    Raises:
        CheckpointError: There is none, several, or only a pickle.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        files = sorted(path.iterdir())
        weights = [file for file in files if file.suffix == ".safetensors"]
        if len(weights) == 1:
            return weights[0]
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles and not weights:
            raise CheckpointError(f"{pickles[0]} is a pickle: {TO_CONVERT}")
        raise CheckpointError(
            f"{path} has {len(weights)} .safetensors files; expected one", hint="pass the file"
        )
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle: {TO_CONVERT}")
    if path.is_file():
        return path
    if re.fullmatch(HUB_ID, where):
        return fetch_single_file(where, revision)
    raise CheckpointError(
        f"no upscaler at {where!r}",
        hint="pass a .safetensors file, a folder with one, or a hub id (org/name)",
    )


def _initial_manifest(name: str, plan: UpscalerBuildPlan, scale: int) -> Manifest:
    """The manifest without what is known only once the component is built."""
    return Manifest(
        name=name,
        source=plan.upscaler,
        sizes=((TILE, TILE),),
        batch=(1, 1, 1),
        latent_channels=3,
        downscale=1,
        max_tokens=0,
        opset=OPSET,
        components={},
        parity={},
        preview=(),
        files={},
        multiple=MULTIPLE,
        family=f"upscaler x{scale}",
    )


def _write_reference(net: RrdbNet, manifest: Manifest, folder: Path) -> None:
    """Samples of torch's output, which `sdrt verify` compares with."""
    reference = TorchReference(manifest, folder)
    with torch.no_grad():
        reference.synthetic(UPSCALER, net, ("enlarged",), {"image": _example_image(TILE, 0)})
    outputs = ReferenceOutputs(reference.samples, [])
    (folder / REFERENCE_FILE).write_text(reference_outputs_to_json(outputs))


def _build_component(
    net: RrdbNet, manifest: Manifest, dtype: str, candidate: Candidate, folder: Path
) -> Component:
    cases = [_example_image(side, seed) for seed, side in enumerate((TILE, TILE // 2))]
    with torch.no_grad():
        expected = [net(torch.from_numpy(image)).numpy() for image in cases]
    net = net.to(getattr(torch, dtype))
    example = torch.from_numpy(np.concatenate([cases[1]] * 2)).to(getattr(torch, dtype))
    specs = export_graph(net, {"image": example}, ("enlarged",), AXES, folder / UPSCALER)
    component = Component(*specs, dtype, {})
    bundle = Bundle(folder, replace(manifest, components={UPSCALER: component}))
    assert candidate.load is not None
    engine = candidate.load(bundle, UPSCALER)
    try:
        measured = [
            parity.measure(
                engine({"image": image})["enlarged"] * 2 - 1, output * 2 - 1, is_image=True
            )
            for image, output in zip(cases, expected, strict=True)
        ]
    finally:
        engine.close()
    values: Mapping[str, float] = parity.worst_case(measured)
    log.info("      %s", "  ".join(f"{name} {value:.6g}" for name, value in values.items()))
    parity.check(UPSCALER, values, dtype)
    activations = alive_bytes(folder / UPSCALER / "model.onnx", manifest)
    return replace(component, parity=values, activations=activations)


def _example_image(side: int, seed: int) -> np.ndarray:
    """[1, 3, side, side] in [0, 1]: blocks of colours."""
    rng = np.random.default_rng(seed)
    blocks = rng.random((1, 3, side // 8, side // 8), np.float32)
    return blocks.repeat(8, 2).repeat(8, 3)
