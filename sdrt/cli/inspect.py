"""What `sdrt inspect` and `sdrt doctor` say: plain values first, then their text."""

import importlib.metadata
import os
import platform
import shutil
from typing import Any

from sdrt.bundle import Bundle
from sdrt.bundle.store import home
from sdrt.errors import BackendError

PACKAGES = (
    *("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "onnx"),
    *(
        "tensorrt",
        "tensorrt-rtx",
        "cuda-bindings",
        "nvidia-cuda-nvrtc",
        "polygraphy",
        "huggingface_hub",
    ),
)


def describe(bundle: Bundle, *, layers: bool = False) -> dict[str, Any]:
    """A bundle as plain values; layers: with what TensorRT makes of its graphs, which raises
    BackendError where there is none.
    """
    manifest = bundle.manifest
    weights = {name: record.size for name, record in manifest.files.items()}
    return {
        "name": manifest.name,
        "folder": str(bundle.folder),
        "source": manifest.source,
        "prediction": manifest.prediction,
        "bytes": bundle.bytes,
        "sizes": [f"{width}x{height}" for width, height in manifest.sizes],
        "batch": list(manifest.batch),
        "opset": manifest.opset,
        "parity": dict(manifest.parity),
        "safety_checker": "safety_checker" in manifest.components,
        "components": {
            name: {
                "dtype": component.dtype,
                "bytes": sum(size for path, size in weights.items() if path.startswith(f"{name}/")),
                "inputs": {spec.name: list(spec.shape) for spec in component.inputs},
                "outputs": {spec.name: list(spec.shape) for spec in component.outputs},
                "parity": dict(component.parity),
                "activations": component.activations,
                **({"layers": _layers(bundle, name)} if layers else {}),
            }
            for name, component in manifest.components.items()
        },
        "plans": sorted(
            str(p.relative_to(bundle.folder)) for p in bundle.folder.glob("plans/*/*.plan")
        ),
    }


def _layers(bundle: Bundle, name: str) -> dict[str, Any]:
    """A component's nodes that TensorRT has kernels of its own for, and where there is a GPU the
    layers of its engine that they went into.
    """
    from sdrt.engine import choose
    from sdrt.engine.selection import installed
    from sdrt.engine.tensorrt.inspector import layers_of, nodes_of
    from sdrt.engine.tensorrt.plans import FULL, MODULES, RTX

    kind = next((kind for kind in (FULL, RTX) if installed(MODULES[kind])), RTX)
    found: dict[str, Any] = {"nodes": nodes_of(kind, bundle.graph(name))}
    try:
        candidate = choose(kind)
    except BackendError as error:
        return {**found, "engine": None, "why_no_engine": str(error)}
    assert candidate.load is not None
    engine: Any = candidate.load(bundle, name)
    nodes = [node for of in found["nodes"].values() for node in of]
    found["engine"] = layers_of(nodes, engine.loaded.layers())
    engine.close()
    return found


def text_from_bundles(described: list[dict[str, Any]]) -> str:
    return "\n\n".join(_text_from_bundle(bundle) for bundle in described)


def _text_from_bundle(bundle: dict[str, Any]) -> str:
    lines = [
        f"{bundle['name']}  ({bundle['folder']})",
        f"  source {bundle['source']}   {megabytes(bundle['bytes'])}   opset {bundle['opset']}",
        f"  sizes {', '.join(bundle['sizes'])}   batch {':'.join(map(str, bundle['batch']))}"
        f"   plans {len(bundle['plans'])}   safety checker "
        f"{'on' if bundle['safety_checker'] else 'off'}",
    ]
    if bundle["prediction"]:
        lines.append(f"  predicts {bundle['prediction']}")
    for name, part in bundle["components"].items():
        proof = "  ".join(f"{key} {value:.3g}" for key, value in part["parity"].items())
        lines.append(f"  {name:13} {part['dtype']:8} {megabytes(part['bytes']):>10}  {proof}")
        lines += _layer_lines(part["layers"]) if "layers" in part else []
    proof = "  ".join(f"{key} {value:.3g}" for key, value in bundle["parity"].items())
    return "\n".join([*lines, f"  {'end to end':13} {proof}"])


def _layer_lines(found: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{what} {len(nodes)}" for what, nodes in found["nodes"].items())
    lines = [f"    TensorRT must fuse: {counts}"]
    if found["engine"] is None:
        return [*lines, f"    no engine to look into: {found['why_no_engine']}"]
    return [*lines, *(f"    {n}: {', '.join(of) or 'none'}" for n, of in found["engine"].items())]


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def diagnose() -> dict[str, Any]:
    """This machine, the packages found and every backend with the reason why it does not work."""
    from sdrt.engine import candidates, choose
    from sdrt.engine.gpu import free_memory, this_machine

    machine = this_machine()
    try:
        chosen = choose()
        taken, because = chosen.title, chosen.because
    except BackendError as error:
        taken, because = None, str(error)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "home": str(home()),
        "free_bytes": shutil.disk_usage(_existing(home())).free,
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": [
            {
                "backend": c.backend,
                "device": c.device,
                "works": c.why_not is None,
                "reason": c.why_not,
            }
            for c in candidates()
        ],
        "driver": machine.driver,
        "cuda": ".".join(map(str, machine.cuda)) if machine.cuda else None,
        "no_gpu": machine.why_none,
        "gpus": [
            {
                "index": gpu.index,
                "name": gpu.name,
                "sm": gpu.sm,
                "bytes": gpu.memory,
                "free_bytes": free_memory(gpu),
            }
            for gpu in machine.gpus
        ],
        "chosen": taken,
        "chosen_because": because,
    }


def _existing(folder: Any) -> Any:
    while not folder.exists():
        folder = folder.parent
    return folder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def text_from_diagnosis(found: dict[str, Any]) -> str:
    lines = [
        f"Python {found['python']} on {found['platform']}, {found['cores']} cores",
        f"bundles in {found['home']} ({found['free_bytes'] / 1e9:.0f} GB free)",
        "packages: " + ", ".join(f"{k} {v}" for k, v in found["packages"].items() if v),
        *_gpu_lines(found),
        "backends, in the order in which auto tries them:",
    ]
    for entry in found["backends"]:
        mark = "works" if entry["works"] else f"no: {entry['reason']}"
        lines.append(f"  {entry['backend']:13} {entry['device']:5} {mark}")
    lines.append(f"auto takes, for a large model: {found['chosen'] or 'nothing: none works'}")
    return "\n".join(lines)


def _gpu_lines(found: dict[str, Any]) -> list[str]:
    if found["no_gpu"]:
        return [f"GPUs: none ({found['no_gpu']})"]
    lines = [f"NVIDIA driver {found['driver'] or 'of unknown version'}, CUDA {found['cuda']}"]
    for gpu in found["gpus"]:
        free = "unknown" if gpu["free_bytes"] is None else f"{gpu['free_bytes'] / 1e9:.1f} GB"
        whole = f"{gpu['bytes'] / 1e9:.1f} GB"
        lines.append(f"  GPU {gpu['index']}: {gpu['name']}, {gpu['sm']}, {whole}, {free} free")
    return lines
