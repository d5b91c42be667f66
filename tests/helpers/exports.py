"""Bundles for tests. Torch's exporter takes most of a build's twenty seconds, and the tests' models
share components: each is exported once in a run of the tests, by whichever worker comes first, and
handed out again for the same module, weights and shapes. All else of a build is done anew, its
proof too.

Whoever tests exporting itself calls `sdrt.export.build.build_bundle`.
"""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from unittest import mock

SPECS = "specs.json"


def built(*arguments, **options) -> Path:
    """`build_bundle(BuildPlan(...))`, of components that this run may have exported before."""
    from sdrt.export import validation
    from sdrt.export.build import BuildPlan, build_bundle

    with mock.patch.object(validation, "export_graph", exported_once):
        return build_bundle(BuildPlan(*arguments, **options))


def exported_once(module, inputs, outputs, axes, folder):
    """What `export_graph` does, once for everything that its result depends on."""
    from sdrt.bundle.manifest import TensorSpec
    from sdrt.export.graph import export_graph

    kept = Path(os.environ["SDRT_TEST_EXPORTS"]) / key_of(module, inputs, outputs, axes)
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (kept / SPECS).exists():
            specs = export_graph(module, inputs, outputs, axes, kept / "graph")
            listed = [[(s.name, s.dtype, s.shape) for s in side] for side in specs]
            (kept / SPECS).write_text(json.dumps(listed))
    shutil.copytree(kept / "graph", folder, dirs_exist_ok=True)
    listed = json.loads((kept / SPECS).read_text())
    return tuple(tuple(TensorSpec(n, d, tuple(shape)) for n, d, shape in side) for side in listed)


def key_of(module, inputs, outputs, axes) -> str:
    """Of the module, its parts' settings, its weights, and the inputs' names and shapes.

    A setting that prints as an address is found by nobody, never by the wrong one.
    """
    told = [repr(module), repr(outputs), repr(axes)]
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if not key.startswith("_")}
        told.append(f"{name} {type(part)} {settings}")
    hashed = hashlib.sha256("\n".join(told).encode())
    weights = {**module.state_dict(), **dict(module.named_buffers())}
    for name, tensor in (*inputs.items(), *weights.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if name in weights:
            hashed.update(tensor.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()
