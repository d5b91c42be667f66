"""The graphs of a bundle's UNet without the work that no step changes, and of that work."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

from sdrt.bundle import Bundle, open_bundle
from sdrt.bundle.integrity import describe_files

SOURCE = Path(__file__).parents[2] / "benchmarks" / "hoisted_graph.py"
SPEC = importlib.util.spec_from_file_location("hoisted_graph", SOURCE)
hoisted_graph = importlib.util.module_from_spec(SPEC)  # `benchmarks` is no package
SPEC.loader.exec_module(hoisted_graph)

PLAIN = "model.onnx"


def derived_bundles(source, folder):
    """By graph file, a bundle whose UNet it is, over one copy of the weights in a new folder."""
    shutil.copytree(source / "unet", folder / "unet")
    manifest = open_bundle(source).manifest
    plain = manifest.components["unet"]
    derived = hoisted_graph.write_hoisted_graphs(folder / "unet", plain.dtype)
    files = describe_files(folder)
    return {
        file: Bundle(
            folder,
            replace(manifest, components={"unet": component}, files=files, admitted={}),
            file,
        )
        for file, component in {PLAIN: plain, **derived}.items()
    }
