"""How many bytes of a graph's values are alive at once, from the shapes that the exporter wrote,
and how many images therefore fit.

Knows ONNX and the engine protocol. What is alive is a lower bound of what running a graph needs
besides its weights: no backend keeps less, most keep more.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import Manifest, TensorSpec
from sdrt.engine import Candidate, memory_budget
from sdrt.engine.axes import axis_lengths, evaluate_axis
from sdrt.errors import BackendError

log = logging.getLogger("sdrt.build")


def activations(graph: Path, lengths: Mapping[str, int]) -> int:
    """The most bytes alive while the graph's nodes run in order; lengths: of its dynamic axes."""
    model = onnx.load(graph, load_external_data=False).graph
    values = (*model.value_info, *model.output)
    sizes = {value.name: _bytes(value.type.tensor_type, lengths) for value in values}
    last = {name: i for i, node in enumerate(model.node) for name in node.input}
    alive: dict[str, int] = {}
    maximum = 0
    for i, node in enumerate(model.node):
        alive |= {name: sizes.get(name, 0) for name in node.output}
        maximum = max(maximum, sum(alive.values()))
        for name in [name for name in alive if last.get(name) == i]:
            del alive[name]
    return maximum


def _bytes(tensor: Any, lengths: Mapping[str, int]) -> int:
    size = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize)
    for axis in tensor.shape.dim:
        size *= _length(axis.dim_param, lengths) if axis.dim_param else axis.dim_value
    return size


def _length(expression: str, lengths: Mapping[str, int]) -> int:
    """1 where the exporter named an axis again, as it does after a padded halving: what is alive
    stays a lower bound.
    """
    try:
        return evaluate_axis(expression, lengths)
    except ValueError:
        return 1


def alive_bytes(graph: Path, manifest: Manifest) -> int:
    """`activations` of one row of the first size."""
    return activations(graph, axis_lengths(manifest, manifest.sizes[0]))


def max_batch_images(bundle: Bundle, candidate: Candidate) -> int:
    """The most images at once, by calculation, confirmed by one evaluation of all of them; where
    that fails it is half of them.
    """
    fraction = memory_budget.USABLE_FRACTION[bool(candidate.gpu)]
    free = int(fraction * (memory_budget.free_bytes(candidate.gpu) or 0))
    count = memory_budget.max_batch_images(bundle.manifest, free)
    log.info("batch: %d images by calculation, %.0f MB may be used", count, free / 1e6)
    while count > 1:
        try:
            _evaluate(bundle, candidate, count)
            return count
        except BackendError as error:
            count //= 2
            log.info("batch: %s; so %d images", error, count)
    return count


def _evaluate(bundle: Bundle, candidate: Candidate, images: int) -> None:
    """One evaluation of so many guided images of the largest size."""
    manifest = replace(bundle.manifest, batch=(1, 1, images))
    size = max(manifest.sizes, key=lambda sides: sides[0] * sides[1])
    lengths = {**axis_lengths(manifest, size), "rows": 2 * images}
    assert candidate.load is not None
    engine = candidate.load(replace(bundle, manifest=manifest), "unet")
    try:
        engine({spec.name: _zeros(spec, lengths) for spec in engine.inputs})
    finally:
        engine.close()


def _zeros(spec: TensorSpec, lengths: Mapping[str, int]) -> np.ndarray:
    shape = [lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    return np.zeros(shape, spec.dtype)
