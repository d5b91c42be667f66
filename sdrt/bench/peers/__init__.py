"""Peers: what users could run instead, on the bundle's own checkpoint.

Knows the peers' interfaces; imported in a worker only, and a peer only where it is installed.
"""

import json
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from sdrt.bundle import Bundle
from sdrt.engine.cpu import has_bf16
from sdrt.engine.selection import is_installed
from sdrt.errors import BackendError

LEFT_OUT = "--exact leaves it out"
TEXT_TO_IMAGE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
CPP = "pip install stable-diffusion-cpp-python"
GENAI = "pip install openvino-genai openvino-tokenizers diffusers torch"
CPP_WIDTHS = [320, 640, 1280, 1280]
OPTIMUM = "pip install 'optimum-onnx[onnxruntime]' 'diffusers<0.36'"


def checkpoint_folder(bundle: Bundle) -> Path | None:
    """Where the bundle's checkpoint lies, if it is a folder that diffusers reads."""
    source = bundle.manifest.source
    shipped = Path(__file__).parents[2] / "models" / source
    for folder in (shipped, Path(source).expanduser()):
        if (folder / "model_index.json").is_file():
            return folder
    return None


def list_peers(
    bundle: Bundle, compiled: bool = False, exact: bool = False
) -> dict[str, tuple[str, str, str | None]]:
    """Every peer by name: its backend, its precision, and why it cannot run, or None.

    compiled, exact: see `list_contestants`
    """
    checkpoint = checkpoint_folder(bundle)
    away = None if checkpoint else f"its checkpoint {bundle.manifest.source} is not here"
    library = away or (None if is_installed("diffusers") else "pip install diffusers torch")
    lower = library or (None if has_bf16() else "this processor has no bf16")
    lower = lower or (LEFT_OUT if exact else None)
    slow = lower or (None if compiled else "takes minutes; --compiled measures it")
    both = is_installed("optimum") and find_spec("optimum.onnxruntime") is not None
    exported = away or (None if both else OPTIMUM)
    return {
        "reference fp32": ("reference", "float32", library),
        "reference bf16": ("reference", "bfloat16", lower),
        "reference bf16 compiled": ("reference", "compiled", slow),
        "optimum onnxruntime": ("optimum", "exact", exported),
        "stable-diffusion.cpp": ("stable-diffusion.cpp", "stored", away or _not_cpp(checkpoint)),
        "OpenVINO GenAI fp32" if exact else "OpenVINO GenAI": (
            "openvino-genai",
            "exact" if exact else "preferred",
            away or _not_genai(checkpoint),
        ),
    }


def _not_cpp(folder: Path | None) -> str | None:
    """Why stable-diffusion.cpp cannot run a checkpoint, if one is here."""
    config = json.loads((folder / "unet" / "config.json").read_text()) if folder else {}
    if config.get("block_out_channels") != CPP_WIDTHS:
        return "it only supports UNets of the published widths"
    return _not_native(folder) or (None if is_installed("stable_diffusion_cpp") else CPP)


def _not_genai(folder: Path | None) -> str | None:
    """Why OpenVINO GenAI, or the export for it, cannot run a checkpoint, if one is here."""
    needed = ("openvino_genai", "openvino_tokenizers", "diffusers", "torch")
    return _not_native(folder) or (None if all(map(is_installed, needed)) else GENAI)


def _not_native(folder: Path | None) -> str | None:
    index = json.loads((folder / "model_index.json").read_text()) if folder else {}
    kind = index.get("_class_name")
    return None if kind == TEXT_TO_IMAGE[0] else f"it is measured with {TEXT_TO_IMAGE[0]} only"


def prepare(backend: str, bundle: Bundle, folder: Path) -> None:
    """What a peer in C++ reads in place of the bundle's checkpoint, which is no part of its start;
    nothing for any other backend. Raises BackendError.
    """
    checkpoint = checkpoint_folder(bundle)
    if checkpoint and backend == "stable-diffusion.cpp":
        write_readable(checkpoint, folder)
    if checkpoint and backend == "openvino-genai":
        command = [sys.executable, "-m", "sdrt.bench.peers.ir_export", str(checkpoint), str(folder)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise BackendError(f"failed to export its models: {lines[-1]}")


def write_readable(checkpoint: Path, folder: Path) -> None:
    """A checkpoint as stable-diffusion.cpp reads it: the names of the text encoder's weights begin
    with `text_model.`, as transformers wrote them until its version 5.
    """
    for part in ("unet", "vae", "text_encoder"):
        (folder / part).mkdir()
        file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        source = (checkpoint / part / f"{file}.safetensors").resolve()
        target = folder / part / f"{file}.safetensors"
        if part == "text_encoder":
            _write_named(source, target)
        else:
            target.symlink_to(source)


def _write_named(source: Path, target: Path) -> None:
    with source.open("rb") as file, target.open("wb") as out:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        bare = ("text_model.", "__metadata__")
        named = {n if n.startswith(bare) else f"text_model.{n}": at for n, at in header.items()}
        text = json.dumps(named).encode()
        text += b" " * (-len(text) % 8)
        out.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(file, out)
