"""The processor's maximum: large matrix products, timed in the same rounds as what is compared with
them.

Knows the libraries that multiply; not what is measured. The fastest that is installed is the limit.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from sdrt.engine.cpu import has_bf16
from sdrt.engine.selection import is_installed

SIDE = 2048
FLOPS = 2 * SIDE**3
Product = Callable[[], object]


def products() -> dict[str, tuple[str, Product]]:
    """By dtype: the library that is the fastest here, and its product of two [SIDE, SIDE]."""
    products_by_dtype = {"float32": _fastest(_candidates("float32"))}
    if has_bf16() and (lower := _candidates("bfloat16")):
        products_by_dtype["bfloat16"] = _fastest(lower)
    return products_by_dtype


def _candidates(dtype: str) -> dict[str, Product]:
    left, right = np.random.default_rng(0).random((2, SIDE, SIDE), np.float32)
    products_by_dtype: dict[str, Product] = {}
    if dtype == "float32":
        products_by_dtype["numpy"] = partial(np.matmul, left, right, out=np.empty_like(left))
    if is_installed("openvino"):
        products_by_dtype["OpenVINO"] = _openvino(
            left, right, "f32" if dtype == "float32" else "bf16"
        )
    if is_installed("torch"):
        import torch

        kind = getattr(torch, dtype)
        pair = (torch.from_numpy(array).to(kind) for array in (left, right))
        products_by_dtype["torch"] = partial(torch.matmul, *pair)
    return products_by_dtype


def _openvino(left: np.ndarray, right: np.ndarray, precision: str) -> Product:
    import openvino as ov
    from openvino import opset13 as op

    parameter = op.parameter(list(left.shape), np.float32)
    model = ov.Model([op.matmul(parameter, op.constant(right), False, False)], [parameter])
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return partial(request.infer, [left], share_inputs=True, share_outputs=True)


def _fastest(candidates: dict[str, Product]) -> tuple[str, Product]:
    return min(candidates.items(), key=lambda item: min(_seconds(item[1]) for _ in range(4)))


def _seconds(product: Product) -> float:
    began = time.perf_counter()
    product()
    return time.perf_counter() - began
