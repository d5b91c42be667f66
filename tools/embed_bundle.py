"""Writes what the package ships of the embedded model's bundle: `make bundle`.

    python tools/embed_bundle.py FOLDER NAME

FOLDER is a bundle of the embedded model NAME. All of its files are copied to
`sdrt/models/NAME.bundle` but the weights, of which `sdrt.bundle.embedded` takes the headers from
there and the tensors from the checkpoint. Constants are what the checkpoint does not have.
"""

import shutil
import sys
from pathlib import Path

from safetensors.numpy import save_file

from sdrt.bundle.embedded import (
    CHECKPOINT_FILES,
    CONSTANTS,
    HEADER,
    MODELS,
    PADDING,
    find_tensor,
)
from sdrt.bundle.manifest import WEIGHTS
from sdrt.bundle.safetensors import Tensors, read_header

MAX_BYTES = 1_000_000  # of all files together: they are in version control


def embed(bundle: Path, name: str) -> Path:
    """Write a model's shipped bundle; returns its folder."""
    target = MODELS / f"{name}.bundle"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(bundle, target, ignore=shutil.ignore_patterns(WEIGHTS, "plans"))
    constants = {}
    files = {part: file for part, file in CHECKPOINT_FILES.items() if (bundle / part).is_dir()}
    for component, file in files.items():
        weights = bundle / component / WEIGHTS
        start = read_header(weights).start
        (target / component / HEADER).write_bytes(weights.read_bytes()[:start])
        checkpoint = Tensors(MODELS / name / file)
        for key, array in Tensors(weights).items():
            if not key.startswith(PADDING) and find_tensor(key, checkpoint) is None:
                constants[f"{component}.{key}"] = array.copy()
    save_file(constants, target / CONSTANTS)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise SystemExit(f"{target} has {size} bytes, expected at most {MAX_BYTES}")
    return target


if __name__ == "__main__":
    print(embed(Path(sys.argv[1]), sys.argv[2]))
