"""The bundle: a folder with ONNX graphs, one copy of the weights, and a manifest that names it all.

Knows files and hashes; not what a graph computes. `sdrt.json` is written last and read first: a
folder without it is not a bundle. One from elsewhere holds nothing but what its manifest lists.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdrt.errors import BundleError, UsageError
from sdrt.json_validation import read_json

from .integrity import check_files
from .manifest import (
    CONTROL,
    CONTROL_GRAPH,
    EMBEDDINGS_GRAPH,
    FLOAT32_GRAPH,
    IP_ADAPTER,
    LORA_GRAPH,
    LORA_PARTS,
    MANIFEST,
    SHALLOW,
    SHALLOW_GRAPH,
    SMALL_FILES,
    TEXT_ENCODERS,
    TOKEN_EMBEDDINGS,
    UPSCALER,
    WEIGHTS,
    Component,
    Manifest,
    TensorSpec,
    read_manifest,
)
from .store import find_bundle

# Over another component's weights.
DERIVED_GRAPHS = {SHALLOW: f"unet/{SHALLOW_GRAPH}", CONTROL: f"unet/{CONTROL_GRAPH}"}
DERIVED_GRAPHS |= {name: f"{part}/{LORA_GRAPH}" for part, name in LORA_PARTS.items()}
# Not listed in the manifests of earlier builds; derived again before they are used.
UNLISTED_GRAPHS = {f"{part}/{EMBEDDINGS_GRAPH}" for part in TEXT_ENCODERS}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder and its manifest."""

    folder: Path
    manifest: Manifest = field(repr=False)
    graph_file: str = "model.onnx"

    def json(self, path: str) -> dict[str, Any]:
        """One of the bundle's JSON files, such as `scheduler/scheduler_config.json`."""
        return read_json(self.folder / path)

    def graph(self, component: str) -> Path:
        """The component's ONNX file; raises BundleError if the bundle does not have it."""
        if component not in self.manifest.components:
            have = ", ".join(self.manifest.components)
            raise BundleError(f"{self.folder} has no {component}; it has {have}")
        return self.folder / graph_name(component, self.graph_file)

    def in_float32(self, component: str) -> "Bundle | None":
        """The same with the graph of a half-precision component that computes in float32, from the
        same weights, inputs and outputs alike; None if the bundle has none.
        """
        has = f"{component}/{FLOAT32_GRAPH}" in self.manifest.files
        return replace(self, graph_file=FLOAT32_GRAPH) if has else None

    @property
    def precision(self) -> str:
        """Of the weights: fp16 or fp32."""
        dtypes = {component.dtype for component in self.manifest.components.values()}
        return "fp16" if "float16" in dtypes else "fp32"

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.manifest.files.values())


def graph_name(component: str, file: str = "model.onnx") -> str:
    """Where a component's graph is in a bundle."""
    return DERIVED_GRAPHS.get(component, f"{component}/{file}")


def weights_name(component: str) -> str:
    """Where a component's weights are in a bundle."""
    return str(Path(graph_name(component)).with_name(WEIGHTS))


def embeddings_component(component: Component) -> Component:
    """A text encoder with the input `token_embeddings` [rows, tokens, width]."""
    rows_and_tokens, width = component.inputs[0].shape, component.outputs[0].shape[-1:]
    embeddings = TensorSpec(TOKEN_EMBEDDINGS, component.dtype, (*rows_and_tokens, *width))
    return replace(component, inputs=(*component.inputs, embeddings))


def open_bundle(name: str | os.PathLike[str] | None = None) -> Bundle:
    """Read and check a bundle; raises BundleError: missing, damaged, of another format."""
    folder = find_bundle(name)
    manifest = read_manifest(folder)
    check_contents(folder, manifest)
    check_files(folder, manifest.files, list_graphs(manifest))
    return Bundle(folder, manifest)


def check_makes_images(bundle: Bundle) -> None:
    """Raise BundleError for a bundle of networks that serve those of models."""
    if IP_ADAPTER in bundle.manifest.components:
        name = bundle.manifest.name
        raise BundleError(
            f"{name} is an IP-Adapter, which generates no image alone",
            hint=f"run `sdrt run PROMPT --ip-adapter {name}=IMAGE` with a model of its family",
        )
    if UPSCALER in bundle.manifest.components:
        name = bundle.manifest.name
        raise BundleError(
            f"{name} is an upscaler, which makes no image alone",
            hint=f"run `sdrt upscale IMAGE --upscaler {name}`",
        )
    if bundle.manifest.control_net is not None:
        name = bundle.manifest.name
        raise BundleError(
            f"{name} is a control bundle, which makes no image alone",
            hint=f"run `sdrt run PROMPT --control {name}=IMAGE` with a model of its family",
        )


def check_contents(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError unless the components' folders hold the files that the manifest lists and
    no others, which nothing verifies. Plans are not part of a bundle: their sidecars verify them.
    Graphs that are derived from others are derived again before they are used.

    Links out of the bundle and special files are refused; hard links are not, since their content
    is compared with the manifest.
    """
    graphs = list_graphs(manifest)
    weights = {weights_name(part) for part in manifest.components}
    needed = {graph_name(part) for part in manifest.components} | weights
    if missing := sorted(needed - set(manifest.files)):
        raise BundleError(f"{folder / MANIFEST} is not a manifest: it lists no {missing[0]}")
    if unused := sorted(set(manifest.files) - set(graphs) - weights - SMALL_FILES):
        raise BundleError(f"{folder / MANIFEST} lists {unused[0]}, which no bundle has")
    inside = folder.resolve()
    for name in manifest.files:
        path = (folder / name).resolve()
        if not path.is_relative_to(inside):
            raise BundleError(f"{folder / name} is a link out of the bundle, to {path}")
        if path.exists() and not path.is_file():
            raise BundleError(f"{folder / name} is not a file")
    allowed = {*manifest.files, *UNLISTED_GRAPHS}
    for top in sorted({name.split("/")[0] for name in manifest.files}):
        for path in sorted((folder / top).rglob("[!.]*")):
            name = path.relative_to(folder).as_posix()
            if name not in allowed and not path.is_dir():
                raise BundleError(
                    f"{path} is not listed in {MANIFEST}",
                    hint="delete it, or build the bundle again",
                )


def list_graphs(manifest: Manifest) -> dict[str, Component]:
    """Every graph that a bundle may hold, and the component whose inputs and outputs it has."""
    parts = manifest.components.items()
    exact = {graph_name(part, FLOAT32_GRAPH): component for part, component in parts}
    for part, component in parts:
        if part in TEXT_ENCODERS:
            exact[graph_name(part, EMBEDDINGS_GRAPH)] = embeddings_component(component)
    return exact | {graph_name(part): component for part, component in parts}


def parse_size(text: str, name: str = "size") -> tuple[int, int]:
    """`"512x768"` -> (512, 768): width and height in pixels, each a multiple of 8 from 16 on.

    Args:
        text: The size.
        name: The option's, for errors.
    """
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if not match:
        raise UsageError(f"{name} {text!r} is not WIDTHxHEIGHT", hint="for example 512x512")
    width, height = int(match[1]), int(match[2])
    for side in (width, height):
        if side % 8 or not 16 <= side <= 8192:
            near = min(max(16, round(side / 8) * 8), 8192)
            raise UsageError(
                f"{name} {text!r}: {side} is not a multiple of 8 from 16 to 8192; nearest: {near}"
            )
    return width, height
