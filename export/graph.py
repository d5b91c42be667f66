"""A torch module to `model.onnx` next to `model.safetensors`: one copy of the weights, each under
the name that it has in the module, followed by `.T` where it is stored transposed.

Knows torch's exporter and the ONNX intermediate representation; not which network it is given.
"""

import contextlib
import gc
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from sdrt.bundle.manifest import (
    FEATURE,
    FLOAT32_GRAPH,
    SHALLOW_GRAPH,
    TRANSPOSED,
    Component,
    TensorSpec,
)

from .safetensors_writer import Entry, write_safetensors

OPSET = 23
SMALLEST_EXTERNAL = 1024  # bytes; shapes and scalars stay inside the graph, weights never do
# Pixels. Left to itself the exporter traces a VAE's encoder, fails, and traces it again with these.
SMALLEST_SIDES = {"height": 8, "width": 8}
SAFETENSORS_DTYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
    ir.DataType.BOOL: "BOOL",
}
NUMPY_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}
NUMPY_DTYPES |= {ir.DataType.INT32: "int32", ir.DataType.INT64: "int64"}


def export_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    folder: Path,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Write the module's graph and weights; returns its input and output specs.

    inputs: example tensors by name, in the order of `forward`
    axes: for each input, the names of its dynamic axes
    """
    model = _exported(module, inputs, outputs, axes)
    folder.mkdir(parents=True, exist_ok=True)
    specs = graph_specs(model.graph.inputs), graph_specs(model.graph.outputs)
    _search_floats(model.graph)
    _strip(model)
    _name_weights(model, module.state_dict())
    _move_weights(model, folder, set(module.state_dict()))
    ir.save(model, folder / "model.onnx")
    return specs


def write_float32_graph(folder: Path) -> None:
    """Write a float32 graph next to a half-precision one, over the same stored weights and with the
    same inputs and outputs, for what overflows once in many images.
    """
    model = ir.load(folder / "model.onnx")
    graph = model.graph
    for node in graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16:
                value.dtype = ir.DataType.FLOAT
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    sources = [*graph.inputs, *graph.initializers.values()]
    for value in sources:
        if value.dtype == ir.DataType.FLOAT16:
            cast = _cast(value, ir.DataType.FLOAT)
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(graph[0], cast)
    for i, value in enumerate(graph.outputs):
        cast = _cast(value, ir.DataType.FLOAT16)
        cast.outputs[0].name, value.name = value.name, f"{value.name}_float32"
        cast.outputs[0].shape = value.shape
        graph.append(cast)
        graph.outputs[i] = cast.outputs[0]
    ir.save(model, folder / FLOAT32_GRAPH)


def write_shallow_graph(folder: Path, dtype: str) -> Component:
    """Write the graph that takes a UNet's output `feature` as an input, over the same stored
    weights: what remains of the network. Returns it, not validated.
    """
    model = ir.load(folder / "model.onnx")
    graph = model.graph
    output, produced = graph.outputs
    sample, deep = (list(value.shape or ()) for value in (graph.inputs[0], produced))
    shape = ir.Shape([*sample[:1], *deep[1:2], *sample[2:]])  # as the sample names its sides
    external = ir.Value(name=FEATURE, shape=shape, type=produced.type)
    produced.name = f"{FEATURE}_made"
    graph.outputs.remove(produced)
    produced.replace_all_uses_with(external)
    graph.inputs.append(external)
    RemoveUnusedNodesPass()(model)
    ir.save(model, folder / SHALLOW_GRAPH)
    values = graph.initializers.values()
    stored = (v.name for v in values if isinstance(v.const_value, ir.ExternalTensor))
    weights = tuple(sorted(str(name) for name in stored))
    return Component(graph_specs(graph.inputs), graph_specs([output]), dtype, {}, weights)


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    produced = ir.node("Cast", [value], {"to": to}, name=f"{value.name}_to_{to.name.lower()}")
    produced.outputs[0].name = f"{value.name}_{to.name.lower()}"
    produced.outputs[0].dtype, produced.outputs[0].shape = to, value.shape
    return produced


def _exported(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
) -> ir.Model:
    names = {name for of in axes.values() for name in of.values()}
    plain = {name.rpartition("*")[2] for name in names}
    dims: dict[str, Any] = {n: torch.export.Dim(n, min=SMALLEST_SIDES.get(n)) for n in plain}
    dims |= {n: int(n.split("*")[0]) * torch.export.Dim(n.split("*")[1]) for n in names if "*" in n}
    dynamic = {name: {i: dims[axes[name][i]] for i in axes.get(name, {})} for name in inputs}
    with _quiet(), _uncollected(), torch.no_grad():
        program = torch.onnx.export(
            module,
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
        assert program is not None
        initializers = list(program.model.graph.initializers.values())
        program.optimize()
    # The optimiser's rules remember the last graph that they saw, and with it weights that they
    # replaced, which would keep the checkpoint's file in memory.
    for value in initializers:
        if program.model.graph.initializers.get(str(value.name)) is not value:
            value.const_value = None
    _name_sides(program.model)
    return program.model


def _name_sides(model: ir.Model) -> None:
    """Name the sides of latents that the exporter numbered, where no input has them by themselves
    but only multiples of them.
    """
    shape = model.graph.outputs[0].shape or ()
    names = {
        symbol: name
        for dim, name in zip(shape[2:4], ("latent_height", "latent_width"), strict=False)
        for symbol in re.findall(r"\bs\d+\b", str(dim))
    }
    values = [value for node in model.graph for value in node.outputs] if names else []
    for value in values:
        for axis, dim in enumerate(value.shape or ()):
            text = re.sub(r"\bs\d+\b", lambda match: names.get(match[0], match[0]), str(dim))
            if value.shape is not None and text != str(dim):
                value.shape[axis] = ir.SymbolicDim(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter narrates on standard output and warns about its own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    saved_levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, saved_levels, strict=True):
        logger.setLevel(level)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """What a trace makes lives to its end; looking for garbage takes a sixth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def graph_specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of a graph's inputs or outputs."""
    return tuple(
        TensorSpec(
            str(value.name),
            NUMPY_DTYPES[value.dtype],  # type: ignore[index]
            tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()),
        )
        for value in values
    )


def _search_floats(graph: ir.Graph) -> None:
    """Let ArgMax read float32: ONNX Runtime's CUDA provider searches no integers, and a node on the
    host costs a component its CUDA graph. Ids and truth values are exact in float32.
    """
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "ArgMax" else None
        if source is not None and source.dtype in (ir.DataType.INT32, ir.DataType.INT64):
            cast = _cast(source, ir.DataType.FLOAT)
            node.replace_input_with(0, cast.outputs[0])
            graph.insert_before(node, cast)


def _strip(model: ir.Model) -> None:
    """Drop what names source files and modules: it is large and differs between machines."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _name_weights(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Give weights that the exporter stored transposed their name back, and the mark of it.

    Two that share their first and last row cannot be distinguished and keep the exporter's names.
    """
    originals: dict[Any, list[str]] = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            originals.setdefault(_edges(weight.numpy()), []).append(name)
    for value in list(model.graph.initializers.values()):
        if value.name not in weights and len(_shape(value)) == 2:
            names = originals.get(_edges(np.asarray(_tensor(value).numpy()).T), [])
            if len(names) == 1 and names[0] not in model.graph.initializers:
                value.name = names[0] + TRANSPOSED


def _edges(array: np.ndarray) -> tuple[tuple[int, ...], bytes, bytes]:
    """What tells weights apart without reading all of them."""
    return array.shape, array[0].tobytes(), array[-1].tobytes()


def _move_weights(model: ir.Model, folder: Path, weights: set[str]) -> None:
    """Write the weights and all else that is large to safetensors; point the graph at them."""
    large = [
        value
        for value in model.graph.initializers.values()
        if _bytes(value) >= SMALLEST_EXTERNAL or str(value.name).removesuffix(TRANSPOSED) in weights
    ]
    large.sort(key=lambda value: str(value.name))
    entries = [
        Entry(str(v.name), SAFETENSORS_DTYPES[_tensor(v).dtype], _shape(v), _bytes(v))
        for v in large
    ]
    arrays = (np.asarray(_tensor(value).numpy()) for value in large)
    starts = write_safetensors(folder / "model.safetensors", entries, arrays)
    for value, entry, start in zip(large, entries, starts, strict=True):
        value.const_value = ir.ExternalTensor(
            "model.safetensors",
            start,
            entry.length,
            _tensor(value).dtype,
            shape=ir.Shape(entry.shape),
            name=entry.name,
            base_dir=folder,
        )


def _tensor(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value


def _bytes(value: ir.Value) -> int:
    return int(_tensor(value).nbytes)


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(int(dim) for dim in _tensor(value).shape)
