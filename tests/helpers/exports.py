"""Bundles for tests. Torch's exporter takes most of a build's twenty seconds, and the tests' models
share components: each is exported once, by whichever worker comes first, and copied from
`disk_cache` for the same module, shapes, sources and packages, also in later runs, with the weights
of the model at hand. All else of a build is done again: its validation compares what was copied
with torch.

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

import numpy as np
from disk_cache import REPOSITORY, cache_folder, cached, hash_files

GRAPH, WEIGHTS, SPECS = "graph", "model.safetensors", "specs.json"
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
    """What `export_graph` does, once for everything that its result depends on. Modules that differ
    in their weights alone share a graph, unless it holds constants that were computed from them.
    """

    def write(entry):
        specs = export_graph(module, inputs, outputs, axes, entry / GRAPH)
        listed = [[(s.name, s.dtype, s.shape) for s in side] for side in specs]
        (entry / SPECS).write_text(json.dumps({"specs": listed, "weights": weights}))

    from sdrt.export.graph import export_graph

    store, key = cache_folder() / "exports", key_of(module, inputs, outputs, axes)
    weights, state = hash_weights(module), module.state_dict()
    with cached(store, key, write) as entry:
        stored = json.loads((entry / SPECS).read_text())
        if stored["weights"] == weights or holds_only(entry / GRAPH, state):
            return copy_graph(entry, folder, state)
    with cached(store, hash_texts(key, weights), write) as entry:
        return copy_graph(entry, folder, state)


def copy_graph(entry, folder, state):
    """The entry's graph with these weights; returns its specs."""
    from sdrt.bundle.manifest import TensorSpec

    shutil.copytree(entry / GRAPH, folder, dirs_exist_ok=True)
    with (folder / WEIGHTS).open("r+b") as file:
        for name, start in weight_offsets(folder).items():
            if (value := find_weight(name, state)) is not None:
                file.seek(start)
                file.write(np.ascontiguousarray(value.detach().numpy()).tobytes())
    listed = json.loads((entry / SPECS).read_text())["specs"]
    return tuple(tuple(TensorSpec(n, d, tuple(shape)) for n, d, shape in side) for side in listed)


def weight_offsets(folder) -> dict[str, int]:
    """Where each tensor next to a graph begins in its file."""
    with (folder / WEIGHTS).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    names = [name for name in header if not name.startswith("__")]
    return {name: 8 + length + header[name]["data_offsets"][0] for name in names}


def find_weight(name, state):
    """The module's weight that is stored under a name, or none."""
    from sdrt.bundle.manifest import TRANSPOSED

    plain = name.removesuffix(TRANSPOSED)
    return state.get(name, state[plain].T if plain != name and plain in state else None)


def holds_only(folder, state) -> bool:
    """Whether all of a graph's constants are weights by name, but for scalars and vectors."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    large = [t for t in graph.initializer if t.external_data or sum(n > 1 for n in t.dims) > 1]
    return all(find_weight(tensor.name, state) is not None for tensor in large)


def key_of(module, inputs, outputs, axes) -> str:
    """Of the exporter, the module, its parts' settings, the names, dtypes and shapes of its weights
    and inputs, where an input's size is not dynamic.

    A setting that prints as an address is found by nobody, never by the wrong one.
    """
    parts = [exporter_hash(REPOSITORY), repr(module), *outputs]
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if not key.startswith("_")}
        parts.append(f"{name} {type(part)} {settings}")
    tensors = {**module.state_dict(), **dict(module.named_buffers())}
    parts += [f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items()]
    for name, t in inputs.items():
        dynamic = axes.get(name, {})
        sizes = [dynamic.get(axis, size) for axis, size in enumerate(t.shape)]
        parts.append(f"{name} {t.dtype} {sizes}")
    return hash_texts(*parts)


def hash_weights(module) -> str:
    hashed = hashlib.sha256()
    for tensor in {**module.state_dict(), **dict(module.named_buffers())}.values():
        hashed.update(tensor.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def hash_texts(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


@functools.cache
def exporter_hash(root: Path) -> str:
    """Of what turns a module into a graph: our sources, Python and the packages."""
    sources = [*root.glob("export/**/*.py"), root / "sdrt" / "bundle" / "manifest.py"]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    exporter = f"{sys.version}\n{versions}\n{hash_files(root, sources)}"
    return hash_texts(exporter)
