"""Weights of matrix products as OpenVINO wants them, kept in the user's folder.

A product's weights are [in, out] in the bundle; OpenVINO reads [out, in], turns them when it
compiles, and in bf16 holds on to the turned ones beside those it packs: 0.65 GB of Stable Diffusion
1.5. Turned once, they are mapped from a file, and its pages let go. Knows openvino.
"""

import mmap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as operations

from sdrt.bundle import TRANSPOSED, WEIGHTS, Bundle
from sdrt.tensors import Tensors

from .kept import kept

MAKER, FILE = "cpu-openvino", "turned.bin"
FLOATS = "Constant", ov.Type.f32


def turned(bundle: Bundle, component: str) -> Path | None:
    """The file of turned weights, made where there is none yet; None if there is to be none."""
    graph = bundle.graph(component)
    found = kept(bundle, component, MAKER, partial(_make, graph), {FILE})
    return found and found / FILE


def _make(graph: Path, folder: Path) -> None:
    tensors = Tensors(graph.with_name(WEIGHTS))
    with (folder / FILE).open("wb") as file:
        for node in _products(ov.Core().read_model(str(graph))):
            weights = tensors[node.input_value(1).get_node().get_friendly_name()]
            np.ascontiguousarray(weights.T).tofile(file)


def _products(model: ov.Model) -> Iterator[ov.Node]:
    """The products with a weight of float32 that is stored turned, in the order of their names."""
    found = {}
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and not node.get_attributes()["transpose_b"]:
            weight = node.input_value(1).get_node()
            kind = weight.get_type_name(), weight.get_element_type()
            if weight.get_friendly_name().endswith(TRANSPOSED) and kind == FLOATS:
                found[weight.get_friendly_name()] = node
    for name in sorted(found):
        yield found[name]


def put_turned(model: ov.Model, file: Path) -> mmap.mmap | None:
    """Give the model's products the turned weights; returns their mapping, whose pages may be let
    go whenever nothing runs, or None for a model without such products.
    """
    if not file.stat().st_size:
        return None
    with file.open("rb") as opened:
        # OpenVINO's interface wants memory that could be written, though it never does.
        mapped = mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    at = 0
    for node in _products(model):
        old = node.input_value(1).get_node()
        shape = old.get_output_shape(0)[::-1]
        array = np.frombuffer(mapped, np.float32, shape[0] * shape[1], at).reshape(shape)
        at += array.nbytes
        weight = ov.op.Constant(array, shared_memory=True)
        weight.set_friendly_name(old.get_friendly_name())
        product = operations.matmul(node.input_value(0), weight, False, True)
        product.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(product.output(0))
    return mapped
