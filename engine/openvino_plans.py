"""Models as OpenVINO has compiled them for this processor, kept in the user's folder.

Compiling a large UNet takes seconds at every opening; what comes out of it, less the weights, is
some megabytes. The weights lie beside it as OpenVINO wants them: those of matrix products are
[in, out] in the bundle and [out, in] here, for in bf16 it would hold both, 0.65 GB of Stable
Diffusion 1.5. Knows openvino.
"""

from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as operations

from sdrt.bundle import TRANSPOSED, Bundle
from sdrt.errors import BackendError

from .kept import kept
from .mapped import trim
from .processor import has_bf16

GRAPH, WEIGHTS = "model.xml", "model.bin"
FLOATS = "Constant", ov.Type.f32


def compiled(bundle: Bundle, component: str, precision: str) -> Path | None:
    """The compiled model of a component, beside its `WEIGHTS`; made where there is none yet, None
    if there is to be none.

    precision: f32 or, where the processor has it, bf16; both are made at once, of the same weights
    """
    precisions = ("f32", "bf16") if has_bf16() else ("f32",)
    make = partial(_make, bundle.graph(component), precisions)
    wanted = {WEIGHTS, *map(_named, precisions)}
    found = kept(bundle, component, "openvino", make, wanted)
    return found and found / _named(precision)


def settings(precision: str) -> dict[str, str]:
    """What is computed in fp32 or bf16; the graph itself stays as it is stored."""
    return {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}


def imported(file: Path, precision: str) -> ov.CompiledModel:
    """A compiled model whose weights are mapped; raises RuntimeError."""
    weights = {"WEIGHTS_PATH": str(file.with_name(WEIGHTS))}
    return ov.Core().import_model(file.read_bytes(), "CPU", _without(precision) | weights)


def _without(precision: str) -> dict[str, str]:
    """Settings of a compiled model that names its weights and does not hold them."""
    return settings(precision) | {"ENABLE_WEIGHTLESS": "YES", "CACHE_MODE": "OPTIMIZE_SIZE"}


def _named(precision: str) -> str:
    return f"{precision}.blob"


def _make(graph: Path, precisions: tuple[str, ...], folder: Path) -> None:
    core = ov.Core()
    try:
        model = core.read_model(str(graph))
        _turn_products(model)
        # Only what is read from such a file has weights that a compiled model can name.
        ov.serialize(model, str(folder / GRAPH), str(folder / WEIGHTS))
        del model
        for precision in precisions:
            model = core.read_model(str(folder / GRAPH))
            made = core.compile_model(model, "CPU", _without(precision)).export_model()
            (folder / _named(precision)).write_bytes(made.getbuffer())
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot compile {graph}: {error}") from error
    (folder / GRAPH).unlink()
    trim()


def _turn_products(model: ov.Model) -> None:
    """Have products read weights of float32 as [out, in] that are stored as [in, out]."""
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        old = node.input_value(1).get_node()
        kind = old.get_type_name(), old.get_element_type()
        if old.get_friendly_name().endswith(TRANSPOSED) and kind == FLOATS:
            weight = ov.op.Constant(np.ascontiguousarray(old.data.T))
            weight.set_friendly_name(old.get_friendly_name())
            product = operations.matmul(node.input_value(0), weight, False, True)
            product.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(product.output(0))
