"""Bundles whose rows have LoRA factors, without an export: their graphs are derived."""

import shutil
from dataclasses import replace
from pathlib import Path

from sdrt.bundle import Bundle, open_bundle
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import LORA_PARTS, MANIFEST, json_from_manifest


def with_lora_graphs(source: Path, target: Path, rank: int) -> Bundle:
    """A copy of a bundle as `sdrt build --lora-rank` writes it, not validated."""
    from sdrt.export.lora_graph import write_lora_graph

    bundle = open_bundle(source)
    shutil.copytree(bundle.folder, target, ignore=shutil.ignore_patterns("plans", MANIFEST))
    components = dict(bundle.manifest.components)
    for part, name in LORA_PARTS.items():
        if part in components:
            derived = write_lora_graph(target / part, rank, components[part].dtype)
            components[name] = replace(derived, parity=components[part].parity)
    manifest = replace(bundle.manifest, name=target.name, components=components)
    files = {
        name: record
        for name, record in describe_files(target).items()
        if name in manifest.files or name.endswith("lora.onnx")
    }
    (target / MANIFEST).write_text(json_from_manifest(replace(manifest, files=files)))
    return open_bundle(target)
