"""Bundles for tests. Torch's exporter takes most of a build's twenty seconds, and the tests' models
share components: each is exported once, by whichever worker comes first, and copied from
`disk_cache` for the same module, weights, shapes, sources and packages, also in later runs. All
else of a build is done again, its validation too.

Tests of the export itself call `sdrt.export.build.build_bundle`.
"""

import functools
import hashlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

from disk_cache import REPOSITORY, cache_folder, cached, hash_files

GRAPH, SPECS = "graph", "specs.json"
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "numpy")


def built(*arguments, **options) -> Path:
    """`build_bundle(BuildPlan(...))` of components that may have been exported before."""
    from sdrt.export import validation
    from sdrt.export.build import BuildPlan, build_bundle

    with mock.patch.object(validation, "export_graph", exported_once):
        return build_bundle(BuildPlan(*arguments, **options))


def built_control(*arguments, **options) -> Path:
    """The same with `build_control_bundle(ControlBuildPlan(...))`."""
    from sdrt.export import validation
    from sdrt.export.control_build import ControlBuildPlan, build_control_bundle

    with mock.patch.object(validation, "export_graph", exported_once):
        return build_control_bundle(ControlBuildPlan(*arguments, **options))


def built_ip_adapter(*arguments, **options) -> Path:
    """The same with `build_ip_adapter_bundle(IpAdapterBuildPlan(...))`."""
    from sdrt.export import validation
    from sdrt.export.ip_adapter_bundle import IpAdapterBuildPlan, build_ip_adapter_bundle

    with mock.patch.object(validation, "export_graph", exported_once):
        return build_ip_adapter_bundle(IpAdapterBuildPlan(*arguments, **options))


def load_component(name: str, checkpoint):
    """One of a checkpoint's components as a torch module; name: such as `vae_decoder`."""
    from sdrt.export import modules
    from sdrt.export.model_spec import parse_model_spec

    return getattr(modules, f"load_{name}")(checkpoint, parse_model_spec(checkpoint))


def exported_once(module, inputs, outputs, axes, folder):
    """What `export_graph` does, once for everything that its result depends on."""
    from sdrt.bundle.manifest import TensorSpec
    from sdrt.export.graph import export_graph

    def write(entry):
        specs = export_graph(module, inputs, outputs, axes, entry / GRAPH)
        listed = [[(s.name, s.dtype, s.shape) for s in side] for side in specs]
        (entry / SPECS).write_text(json.dumps(listed))

    key = key_of(module, inputs, outputs, axes)
    with cached(cache_folder() / "exports", key, write) as entry:
        shutil.copytree(entry / GRAPH, folder, dirs_exist_ok=True)
        listed = json.loads((entry / SPECS).read_text())
    return tuple(tuple(TensorSpec(n, d, tuple(shape)) for n, d, shape in side) for side in listed)


def key_of(module, inputs, outputs, axes) -> str:
    """Of the exporter, the module, its parts' settings, its weights, and the inputs' names and
    shapes.

    A setting that prints as an address is found by nobody, never by the wrong one.
    """
    parts = [exporter_hash(REPOSITORY), repr(module), repr(outputs), repr(axes)]
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if not key.startswith("_")}
        parts.append(f"{name} {type(part)} {settings}")
    hashed = hashlib.sha256("\n".join(parts).encode())
    weights = {**module.state_dict(), **dict(module.named_buffers())}
    for name, tensor in (*inputs.items(), *weights.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if name in weights:
            hashed.update(tensor.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


@functools.cache
def exporter_hash(root: Path) -> str:
    """Of what turns a module into a graph: our sources, Python and the packages."""
    sources = [*root.glob("export/**/*.py"), root / "sdrt" / "bundle" / "manifest.py"]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    exporter = f"{sys.version}\n{versions}\n{hash_files(root, sources)}"
    return hashlib.sha256(exporter.encode()).hexdigest()
