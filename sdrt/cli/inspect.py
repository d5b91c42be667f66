"""What `sdrt inspect` says: plain values first, then their text."""

from typing import Any

from sdrt.bundle import Bundle
from sdrt.errors import BackendError


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
    from sdrt.engine import select_backend
    from sdrt.engine.selection import is_installed
    from sdrt.engine.tensorrt.inspector import group_nodes, layers_by_node
    from sdrt.engine.tensorrt.variants import FULL, MODULES, RTX

    kind = next((kind for kind in (FULL, RTX) if is_installed(MODULES[kind])), RTX)
    report: dict[str, Any] = {"nodes": group_nodes(kind, bundle.graph(name))}
    try:
        candidate = select_backend(kind)
    except BackendError as error:
        return {**report, "engine": None, "why_no_engine": str(error)}
    assert candidate.load is not None
    engine: Any = candidate.load(bundle, name)
    nodes = [node for of in report["nodes"].values() for node in of]
    report["engine"] = layers_by_node(nodes, engine.plan.layers())
    engine.close()
    return report


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
        parity = "  ".join(f"{key} {value:.3g}" for key, value in part["parity"].items())
        lines.append(f"  {name:13} {part['dtype']:8} {megabytes(part['bytes']):>10}  {parity}")
        lines += _layer_lines(part["layers"]) if "layers" in part else []
    parity = "  ".join(f"{key} {value:.3g}" for key, value in bundle["parity"].items())
    return "\n".join([*lines, f"  {'end to end':13} {parity}"])


def _layer_lines(report: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{what} {len(nodes)}" for what, nodes in report["nodes"].items())
    lines = [f"    TensorRT must fuse: {counts}"]
    if report["engine"] is None:
        return [*lines, f"    no engine to look into: {report['why_no_engine']}"]
    return [*lines, *(f"    {n}: {', '.join(of) or 'none'}" for n, of in report["engine"].items())]


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
