"""Models that OpenVINO compiled for this processor, in the compile cache.

Compiling a large UNet takes seconds at every load; the result without weights is some megabytes.
Its weights are stored in the layout that OpenVINO computes with, or it would hold both:

- those of matrix products are [in, out] in the bundle and [out, in] here: 0.65 GB of Stable
  Diffusion 1.5 in bf16;
- those in half precision are in float32: 3.4 GB.

Imports openvino, so import it only where it is used.
"""

from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as operations
from openvino.preprocess import PrePostProcessor

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import TRANSPOSED
from sdrt.engine.call_once import call_once
from sdrt.engine.compile_cache import get_or_compile
from sdrt.engine.cpu import has_bf16
from sdrt.engine.page_cache import trim_heap
from sdrt.errors import BackendError

GRAPH, WEIGHTS = "model.xml", "model.bin"
FLOATS = "Constant", ov.Type.f32


@call_once
def initialise() -> None:
    """The binding's NumPy interface and its tables of types, in both directions."""
    for dtype in (np.float32, np.float16, np.int64, np.int32):
        array = np.zeros(1, dtype)
        ov.Tensor(array, shared_memory=True).data.copy()
        constant = ov.op.Constant(array)
        constant.get_attributes()
        constant.data.copy()


def load_compiled(bundle: Bundle, component: str, precision: str) -> Path | None:
    """The compiled model of a component, with its `WEIGHTS` in the same folder; compiled now if it
    is missing. None where nothing is cached.

    precision: f32 or, if the processor has it, bf16; both are compiled at once, sharing weights
    """
    precisions = ("f32", "bf16") if has_bf16() else ("f32",)
    make = partial(_compile_all, bundle.graph(component), precisions)
    files = {WEIGHTS, *map(_blob_name, precisions)}
    folder = get_or_compile(bundle, component, "openvino", make, files)
    return folder and folder / _blob_name(precision)


def compile_settings(precision: str) -> dict[str, str]:
    """Compute in f32 or bf16, whatever the graph's dtype."""
    return {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}


def import_compiled(file: Path, precision: str) -> ov.CompiledModel:
    """A compiled model whose weights are mapped; raises RuntimeError."""
    weights = {"WEIGHTS_PATH": str(file.with_name(WEIGHTS))}
    return ov.Core().import_model(
        file.read_bytes(), "CPU", _weightless_settings(precision) | weights
    )


def _weightless_settings(precision: str) -> dict[str, str]:
    """Settings for a compiled model that refers to its weights instead of containing them."""
    return compile_settings(precision) | {"ENABLE_WEIGHTLESS": "YES", "CACHE_MODE": "OPTIMIZE_SIZE"}


def _blob_name(precision: str) -> str:
    return f"{precision}.blob"


def _compile_all(graph: Path, precisions: tuple[str, ...], folder: Path) -> None:
    core = ov.Core()
    try:
        model = _to_float32(core.read_model(str(graph)))
        _transpose_weights(model)
        # A compiled model can only refer to weights of a model that was read from an IR file.
        ov.serialize(model, str(folder / GRAPH), str(folder / WEIGHTS))
        del model
        for precision in precisions:
            model = core.read_model(str(folder / GRAPH))
            blob = core.compile_model(model, "CPU", _weightless_settings(precision)).export_model()
            (folder / _blob_name(precision)).write_bytes(blob.getbuffer())
    except RuntimeError as error:
        raise BackendError(f"OpenVINO failed to compile {graph}: {error}") from error
    (folder / GRAPH).unlink()
    trim_heap()


def _to_float32(model: ov.Model) -> ov.Model:
    """Convert float16 to float32 everywhere but in inputs and outputs."""
    half = ov.Type.f16
    if not any(node.get_element_type() == half for node in _constants(model)):
        return model
    input_types = [port.get_element_type() for port in model.inputs]
    output_types = [port.get_element_type() for port in model.outputs]
    for parameter in model.get_parameters():
        if parameter.get_element_type() == half:
            parameter.set_element_type(ov.Type.f32)
    for node in _constants(model):
        if node.get_element_type() == half:
            _replace(node, ov.op.Constant(node.data.astype(np.float32)))
    for node in model.get_ops():
        if node.get_type_name() == "Convert" and node.get_attributes()["destination_type"] == "f16":
            _replace(node, operations.convert(node.input_value(0), "f32"))
    model.validate_nodes_and_infer_types()
    edges = PrePostProcessor(model)
    for i, element_type in enumerate(input_types):
        edges.input(i).tensor().set_element_type(element_type)
    for i, element_type in enumerate(output_types):
        edges.output(i).tensor().set_element_type(element_type)
    return edges.build()


def _transpose_weights(model: ov.Model) -> None:
    """Store float32 weights of matrix products as [out, in] instead of [in, out]."""
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        transpose_a = node.get_attributes()["transpose_a"]
        old = node.input_value(1).get_node()
        kind = old.get_type_name(), old.get_element_type()
        if old.get_friendly_name().endswith(TRANSPOSED) and kind == FLOATS:
            weight = ov.op.Constant(np.ascontiguousarray(old.data.T))
            weight.set_friendly_name(old.get_friendly_name())
            _replace(node, operations.matmul(node.input_value(0), weight, transpose_a, True))


def _constants(model: ov.Model) -> list[ov.Node]:
    return [node for node in model.get_ops() if node.get_type_name() == "Constant"]


def _replace(node: ov.Node, other: ov.Node) -> None:
    other.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(other.output(0))
