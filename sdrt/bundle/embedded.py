"""The bundles of the embedded model, its ControlNet and its IP-Adapter, which ship without their
weights and get them on first use.

- `models/<name>` is the checkpoint: float16 safetensors.
- `models/<name>.bundle` has all files of the bundle but `model.safetensors`: graphs, manifest,
  tokenizer, reference outputs; for each `model.safetensors` its header; and the few constants that
  the exporter computed.
- A tensor of the bundle is one of the checkpoint's, cast to the bundle's dtype and transposed where
  its name says so, or one of the constants.

Knows these folders and safetensors; not graphs, and no torch.
"""

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from sdrt.atomic_files import build_once
from sdrt.errors import BundleError

from .manifest import CONTROLNET, IP_ADAPTER, MANIFEST, TRANSPOSED, WEIGHTS, read_manifest
from .safetensors import DTYPES, Tensors, read_header

MODELS = Path(__file__).parent.parent / "models"
HEADER = f"{WEIGHTS}.header"
CONSTANTS = "constants.safetensors"
CHECKPOINT_FILES = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae_decoder": "vae/diffusion_pytorch_model.safetensors",
    "vae_encoder": "vae/diffusion_pytorch_model.safetensors",
    "controlnet": "diffusion_pytorch_model.safetensors",
    "image_encoder": "image_encoder/model.safetensors",
    "ip_adapter": "ip_adapter.safetensors",
}
MODULE_PREFIX = "model."  # of the text and image encoder's tensors in a bundle
NETS = (CONTROLNET, IP_ADAPTER)
PADDING = "__pad."


def embedded_names() -> list[str]:
    """The models whose bundles ship with the package."""
    return [name for name in _shipped() if name not in embedded_net_names()]


def embedded_net_names() -> list[str]:
    """The bundles of a ControlNet or IP-Adapter that ship with the package, for its models."""
    return [name for name in _shipped() if any((_folder(name) / net).is_dir() for net in NETS)]


def _folder(name: str) -> Path:
    return MODELS / f"{name}.bundle"


def _shipped() -> list[str]:
    return sorted(path.parent.stem for path in MODELS.glob(f"*.bundle/{MANIFEST}"))


def embedded_folder(name: str, home: Path) -> Path:
    """Where an embedded model's bundle is once it has its weights; home: `$SDRT_HOME`.

    Each version of the bundle has a folder of its own.
    """
    manifest = (_folder(name) / MANIFEST).read_bytes()
    return home / "embedded" / hashlib.sha256(manifest).hexdigest()[:12] / name


def materialize(name: str, home: Path) -> Path:
    """An embedded model's bundle with its weights, which are written if they are not there yet.

    The folder is published atomically; a second process waits for the first.

    Returns:
        The bundle's folder.

    Raises:
        BundleError: the installed package is damaged.
        SdrtError: the folder cannot be written.
    """
    return build_once(embedded_folder(name, home), partial(_write_bundle, name))


def _write_bundle(name: str, folder: Path) -> None:
    shipped, checkpoint = _folder(name), MODELS / name
    manifest = read_manifest(shipped)
    for file, record in manifest.files.items():
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        if path.name == WEIGHTS:
            _write_weights(path, record.size, shipped, checkpoint)
        else:
            shutil.copyfile(shipped / file, path)
        with path.open("rb") as written:
            if hashlib.file_digest(written, "sha256").hexdigest() != record.sha256:
                raise BundleError(
                    f"the embedded model {name} is damaged: unexpected sha256 of {file}",
                    hint="reinstall sdrt",
                )
    shutil.copyfile(shipped / MANIFEST, folder / MANIFEST)


def _write_weights(path: Path, size: int, shipped: Path, checkpoint: Path) -> None:
    """Write a component's weights: the header, then every tensor at its place between zeros."""
    component = path.parent.name
    tensors = Tensors(checkpoint / CHECKPOINT_FILES[component])
    constants = Tensors(shipped / CONSTANTS)
    shutil.copyfile(shipped / component / HEADER, path)
    os.truncate(path, size)
    header = read_header(path, BundleError)
    with path.open("r+b") as file:
        for name, record in header.records.items():
            if not name.startswith(PADDING):
                array = find_tensor(name, tensors)
                if array is None:
                    array = constants[f"{component}.{name}"]
                file.seek(header.start + record.data_offsets[0])
                file.write(array.astype(DTYPES[record.dtype]).tobytes())


def find_tensor(name: str, checkpoint: Tensors) -> np.ndarray | None:
    """The checkpoint's tensor behind a name in the bundle; None for a constant."""
    stored = name.removesuffix(TRANSPOSED)
    if stored not in checkpoint:
        stored = stored.removeprefix(MODULE_PREFIX)
    if stored not in checkpoint:
        return None
    return checkpoint[stored].T if name.endswith(TRANSPOSED) else checkpoint[stored]
