"""Models that OpenVINO compiled for this processor, in the compile cache.

Compiling a large UNet takes seconds at every load; the result without weights is some megabytes.
Its weights are stored as OpenVINO reads them, or it would hold them twice:

- those of matrix products are [in, out] in the bundle and [out, in] here;
- all of them are in half precision if the bundle's are, else in the precision that is computed
  with; OpenVINO converts them while it packs them, one at a time.

Imports openvino, so import it only where it is used.
"""

import hashlib
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

import numpy as np
import openvino as ov
from openvino import opset13 as operations
from openvino.preprocess import PrePostProcessor

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import TRANSPOSED
from sdrt.engine.call_once import call_once
from sdrt.engine.compile_cache import get_or_compile
from sdrt.engine.page_cache import trim_heap
from sdrt.errors import BackendError

from . import rewriting
from .rewriting import replace_node, rewrite

Shapes = Mapping[str, tuple[int, ...]]  # by the input's name
NO_SHAPES: Shapes = MappingProxyType({})
GRAPH, WEIGHTS, BLOB = "model.xml", "model.bin", "model.blob"
DECOMPRESSED = " in float32"  # ends the names of conversions of weights
DECOMPRESSION = "decompression_0"  # marks what is not to be computed before weights are packed


@call_once
def initialise() -> None:
    """The binding's NumPy interface and its tables of types, in both directions."""
    for dtype in (np.float32, np.float16, np.int64, np.int32):
        array = np.zeros(1, dtype)
        ov.Tensor(array, shared_memory=True).data.copy()
        constant = ov.op.Constant(array)
        constant.get_attributes()
        constant.data.copy()
    ov.Tensor(ov.Type.bf16, ov.Shape([1])).data.copy()


def load_compiled(
    bundle: Bundle, component: str, precision: str, shapes: Shapes = NO_SHAPES
) -> Path | None:
    """The compiled model of a component, with its `WEIGHTS` in the same folder; compiled now if it
    is missing. None where nothing is cached.

    precision: f32 or, if the processor has it, bf16
    shapes: of the inputs, if it is compiled for no others
    """
    compile_into = partial(_compile, bundle.graph(component), precision, shapes)
    files, depends = {WEIGHTS, BLOB}, [precision, _source_hash()]
    if shapes:
        depends.append(repr(sorted(shapes.items())))
    folder = get_or_compile(bundle, component, "openvino", compile_into, files, depends)
    return folder and folder / BLOB


@cache
def _source_hash() -> str:
    """Of the code that decides what is compiled from a graph."""
    files = [Path(__file__), Path(rewriting.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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


def _compile(graph: Path, precision: str, shapes: Shapes, folder: Path) -> None:
    core, file = ov.Core(), folder / GRAPH
    try:
        # A compiled model can only refer to weights of a model that was read from an IR file.
        model = prepare(core.read_model(str(graph)), precision, shapes)
        ov.serialize(model, str(file), str(folder / WEIGHTS))
        del model
        trim_heap()
        _mark_decompression(file)
        compiled = core.compile_model(
            core.read_model(str(file)), "CPU", _weightless_settings(precision)
        )
        (folder / BLOB).write_bytes(compiled.export_model().getbuffer())
    except RuntimeError as error:
        raise BackendError(f"OpenVINO failed to compile {graph}: {error}") from error
    file.unlink()
    trim_heap()


def prepare(model: ov.Model, precision: str, shapes: Shapes) -> ov.Model:
    """The model as it is compiled: rewritten, and its weights stored as this module says."""
    rewrite(model, shapes)
    _transpose_weights(model)
    if precision == "bf16":
        _store_in_bfloat16(model)
    model = _to_float32(model)
    for node in model.get_ops():
        if node.get_friendly_name().endswith(DECOMPRESSED):
            node.get_rt_info()[DECOMPRESSION] = True
    return model


def _store_in_bfloat16(model: ov.Model) -> None:
    """Store float32 weights in bfloat16, rounded to even as OpenVINO does."""
    weights = _weight_names(model)
    for node in _constants(model):
        if node.get_friendly_name() in weights and node.get_element_type() == ov.Type.f32:
            bits = np.ascontiguousarray(node.data).view(np.uint32)
            rounded = ov.Tensor(ov.Type.bf16, node.get_output_shape(0))
            rounded.data.view(np.uint16)[:] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            stored = ov.op.Constant(rounded)
            replace_node(node, stored)
            _decompress(stored)


def _to_float32(model: ov.Model) -> ov.Model:
    """Compute in float32 instead of float16, but for inputs and outputs; weights stay float16."""
    half = ov.Type.f16
    if not any(node.get_element_type() == half for node in _constants(model)):
        return model
    input_types = [port.get_element_type() for port in model.inputs]
    output_types = [port.get_element_type() for port in model.outputs]
    for parameter in model.get_parameters():
        if parameter.get_element_type() == half:
            parameter.set_element_type(ov.Type.f32)
    weights = _weight_names(model)
    for node in _constants(model):
        if node.get_element_type() == half:
            if node.get_friendly_name() in weights:
                _decompress(node)
            else:
                replace_node(node, ov.op.Constant(node.data.astype(np.float32)))
    for node in model.get_ops():
        if node.get_type_name() == "Convert" and node.get_attributes()["destination_type"] == "f16":
            replace_node(node, operations.convert(node.input_value(0), "f32"))
    model.validate_nodes_and_infer_types()
    edges = PrePostProcessor(model)
    for i, element_type in enumerate(input_types):
        edges.input(i).tensor().set_element_type(element_type)
    for i, element_type in enumerate(output_types):
        edges.output(i).tensor().set_element_type(element_type)
    return edges.build()


def _decompress(weight: ov.Node) -> None:
    """Convert a weight to float32 for all that read it."""
    readers = weight.output(0).get_target_inputs()
    node = operations.convert(weight, "f32")
    node.set_friendly_name(weight.get_friendly_name() + DECOMPRESSED)
    for reader in readers:
        reader.replace_source_output(node.output(0))


def _mark_decompression(file: Path) -> None:
    """Mark the conversions of weights in an IR, where the binding's marks are not written."""
    tree = ElementTree.parse(file)
    for layer in tree.iter("layer"):
        if layer.attrib["name"].endswith(DECOMPRESSED):
            mark = ElementTree.SubElement(layer, "rt_info")
            ElementTree.SubElement(mark, "attribute", name="decompression", version="0")
    tree.write(file)


def _transpose_weights(model: ov.Model) -> None:
    """Store weights of matrix products as [out, in] instead of [in, out]."""
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        transpose_a = node.get_attributes()["transpose_a"]
        old = node.input_value(1).get_node()
        if old.get_type_name() == "Constant" and old.get_friendly_name().endswith(TRANSPOSED):
            weight = ov.op.Constant(np.ascontiguousarray(old.data.T))
            weight.set_friendly_name(old.get_friendly_name())
            replace_node(node, operations.matmul(node.input_value(0), weight, transpose_a, True))


def _weight_names(model: ov.Model) -> set[str]:
    """Of what matrix products and convolutions read second."""
    products = [op for op in model.get_ops() if op.get_type_name() in ("MatMul", "Convolution")]
    return {op.input_value(1).get_node().get_friendly_name() for op in products}


def _constants(model: ov.Model) -> list[ov.Node]:
    return [node for node in model.get_ops() if node.get_type_name() == "Constant"]
