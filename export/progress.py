"""The progress of a build, stored in its unfinished folder after each component, so that a build
that was killed continues from the components that it had exported and validated.

It is valid for the same weights, configuration, options, sources and packages only, and never part
of a bundle. Knows files and the reference's state; not how components are built.
"""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle.integrity import PROGRESS, describe_files, hash_file
from sdrt.bundle.manifest import (
    Component,
    FileRecord,
    Manifest,
    json_from_manifest,
    manifest_from_json,
)
from sdrt.errors import SdrtError
from sdrt.json_validation import read_json
from sdrt.runtime.lora.adapters import find_lora, parse_lora

from .checkpoint import Checkpoint
from .reference import TorchReference

log = logging.getLogger("sdrt.build")
STATE = "state.json"
PACKAGES = (
    *("sdrt", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy", "openvino"),
    *("onnxruntime", "onnxruntime-gpu"),
)
SMALL_FILES = (".json", ".txt")  # of a checkpoint, besides its weights


def compute_key(
    checkpoint: Checkpoint, loras: Iterable[str], settings: Mapping[str, object]
) -> str:
    """A hash of everything that a bundle's components depend on; reads all weights once.

    loras: as `sdrt build --lora` takes them
    settings: what else decides about the result, as JSON holds it
    """
    files = {file for part in checkpoint.parts for file in checkpoint.weight_files(part)}
    folders = (checkpoint.folder, *checkpoint.others.values())
    for folder in folders:
        files |= {path for path in folder.rglob("*") if path.suffix in SMALL_FILES}
    files |= {find_lora(parse_lora(name)[0]) for name in loras}
    sources = Path(__file__).parent.rglob("*.py")
    content = {
        "files": [hash_file(path) for path in sorted(files)],
        "sources": [hash_file(path) for path in sorted(sources)],
        "packages": {name: _installed_version(name) for name in PACKAGES},
        "python": sys.version,
        "prediction": repr(checkpoint.prediction),
        "loras": list(loras),
        "parts": list(checkpoint.parts),
        **settings,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass
class BuildProgress:
    """What of a build is complete.

    folder: that is being filled, which a killed build may have left
    key: of `compute_key`
    components: that are exported and validated, by name
    """

    folder: Path
    key: str
    components: dict[str, Component] = field(default_factory=dict)
    _recipes: list[str] = field(default_factory=list)
    _files: dict[str, FileRecord] = field(default_factory=dict)

    def restore(self, reference: TorchReference) -> None:
        """Continue from what a killed build of the same key left, its files intact; delete all
        else in the folder.
        """
        try:
            self._read(reference)
        except (OSError, ValueError, KeyError, TypeError, SdrtError) as error:
            log.debug("no build to continue: %s", error)
        reused = {*self._recipes, PROGRESS} if self._recipes else set()
        for path in self.folder.iterdir():
            if path.name not in reused:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self._recipes:
            names = ", ".join(self._recipes)
            log.info("continuing an interrupted build: %s exported and validated before", names)

    def has(self, recipe: str) -> bool:
        """Whether all components of a recipe are complete."""
        return recipe in self._recipes

    def save(
        self, recipe: str, components: Mapping[str, Component], reference: TorchReference
    ) -> None:
        """Store that a recipe's components are complete."""
        self.components |= components
        self._recipes.append(recipe)
        records = describe_files(self.folder / recipe)
        self._files |= {f"{recipe}/{name}": record for name, record in records.items()}
        manifest = replace(
            reference.manifest,
            components=self.components,
            files=self._files,
            preview=reference.preview,
        )
        arrays = f"{len(self._recipes)}.npz"
        state = {
            "key": self.key,
            "recipes": self._recipes,
            "arrays": arrays,
            "samples": reference.samples,
            "manifest": json.loads(json_from_manifest(manifest)),
        }
        folder = self.folder / PROGRESS
        folder.mkdir(exist_ok=True)
        np.savez(folder / arrays, allow_pickle=False, **_flatten(reference))
        partial = folder / f"{STATE}.partial"
        partial.write_text(json.dumps(state))
        partial.replace(folder / STATE)

    def clear(self) -> None:
        """Delete what only a later build would read."""
        shutil.rmtree(self.folder / PROGRESS, ignore_errors=True)

    def _read(self, reference: TorchReference) -> None:
        """Raises an error, before anything has changed, for what cannot be continued."""
        path = self.folder / PROGRESS / STATE
        state = read_json(path)
        if state["key"] != self.key:
            raise ValueError("it is of other weights, options or versions")
        manifest = manifest_from_json(state["manifest"], path)
        for recipe in state["recipes"]:
            self._check_files(recipe, manifest)
        with np.load(path.with_name(str(state["arrays"])), allow_pickle=False) as stored:
            arrays = dict(stored)
        self.components, self._files = dict(manifest.components), dict(manifest.files)
        self._recipes = list(state["recipes"])
        reference.samples, reference.preview = state["samples"], manifest.preview
        _unflatten(reference, arrays)

    def _check_files(self, recipe: str, manifest: Manifest) -> None:
        records = {
            name.removeprefix(f"{recipe}/"): asdict(record)
            for name, record in manifest.files.items()
            if name.startswith(f"{recipe}/")
        }
        actual = describe_files(self.folder / recipe)
        if {name: asdict(record) for name, record in actual.items()} != records:
            raise ValueError(f"{recipe} is damaged")


def _flatten(reference: TorchReference) -> dict[str, np.ndarray]:
    """The arrays that later components are validated with, each under one name."""
    sized = {"latents": reference.latents, "images": reference.images}
    return {
        **{f"conditioning {name}": array for name, array in reference.conditioning.items()},
        **{
            f"{kind} {width} {height}": array
            for kind, arrays in sized.items()
            for (width, height), array in arrays.items()
        },
    }


def _unflatten(reference: TorchReference, arrays: Mapping[str, np.ndarray]) -> None:
    conditioning: dict[str, Any] = {}
    for name, array in arrays.items():
        kind, *rest = name.split()
        if kind == "conditioning":
            conditioning[rest[0]] = array
        else:
            width, height = map(int, rest)
            sized = reference.latents if kind == "latents" else reference.images
            sized[width, height] = array
    reference.conditioning = conditioning
