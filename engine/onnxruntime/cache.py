"""Graphs that ONNX Runtime optimised for this processor, in the compile cache.

Optimising a large UNet and packing its weights takes ten times as long as reading the result, which
is mapped into memory and shared by processes. Attention is fused first (`fusion`, if onnx is
installed): its score matrices, gigabytes at 512x512, are then never in memory. Without a cached
graph the bundle's own runs.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.bundle import Bundle
from sdrt.engine.compile_cache import get_or_compile
from sdrt.engine.page_cache import trim_heap

from .session import create_session

if TYPE_CHECKING:
    import onnxruntime as ort

GRAPH, WEIGHTS = "model.onnx", "model.data"
FUSED = "fused.onnx"  # their source, for sessions with other weights
# ONNX Runtime refuses an external tensor that shape inference reads; the largest are the sizes into
# which the LoRA factors of SDXL's 722 layers are split, 12 KB.
MIN_EXTERNAL_BYTES = "16384"


def load_optimised(bundle: Bundle, component: str, options: "ort.SessionOptions") -> Path | None:
    """The optimised graph of a component, created if it is missing; None to use the bundle's."""
    fuses = find_spec("onnx") is not None
    make = partial(_optimise, bundle, component, options, fuses)
    key = str(fuses), MIN_EXTERNAL_BYTES
    folder = get_or_compile(bundle, component, "onnxruntime", make, {GRAPH, WEIGHTS}, key)
    return folder and folder / GRAPH


def _optimise(
    bundle: Bundle, component: str, options: "ort.SessionOptions", fuses: bool, folder: Path
) -> None:
    graph, fused = bundle.graph(component), None
    if fuses:
        from .fusion import write_fused_graph

        write_fused_graph(graph, folder / FUSED, norms=False)
        fused = (folder / FUSED).read_bytes()
    options.optimized_model_filepath = str(folder / GRAPH)
    for name, value in (
        ("session.optimized_model_external_initializers_file_name", WEIGHTS),
        ("session.optimized_model_external_initializers_min_size_in_bytes", MIN_EXTERNAL_BYTES),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(name, value)
    create_session(component, graph, options, "CPUExecutionProvider", {}, fused)
    trim_heap()
