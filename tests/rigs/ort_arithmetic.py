"""ONNX Runtime on the CPU as the arithmetic of `runtime_rig`: host functions in the driver's
streams, which on the driver's stand-in may read and write the device's memory.
"""

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from cuda.bindings import driver
from runtime_rig import ask, report

HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int32)": "int32"}


def view(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Memory of the stand-in as an array."""
    count = int(np.prod(shape))
    raw = (ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(memoryview(raw), dtype, count).reshape(shape)


class OrtGraph:
    """A graph of a bundle with the weights of its file, which engines share."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        self.initializers = {i.name: (tuple(i.dims), i.data_type) for i in model.graph.initializer}
        self.session = open_session(path, {})
        self.inputs = {i.name: DTYPES[i.type] for i in self.session.get_inputs()}
        self.outputs = {o.name: DTYPES[o.type] for o in self.session.get_outputs()}
        self._shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = tuple(shapes.items())
        if key not in self._shapes:
            feeds = {n: np.zeros(shapes[n], dtype) for n, dtype in self.inputs.items()}
            values = self.session.run(list(self.outputs), feeds)
            self._shapes[key] = {n: v.shape for n, v in zip(self.outputs, values, strict=True)}
        return self._shapes[key]


@functools.cache
def load_graph(path: Path, _changed: tuple[int, ...]) -> OrtGraph:
    """Opened once for as long as its files are the same."""
    return OrtGraph(path)


def open_session(path: Path, weights: Mapping[str, ort.OrtValue]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if weights:  # read before the graph is optimised, unlike `add_initializer`'s
        options.add_external_initializers(list(weights), list(weights.values()))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OrtArithmetic:
    """A graph of a bundle, whose weights an engine may replace."""

    def __init__(self, path: Path) -> None:
        files = sorted(file for file in path.parent.iterdir() if file.is_file())
        self._graph = load_graph(path, tuple(file.stat().st_mtime_ns for file in files))
        self._path, self._session, self._weights = path, self._graph.session, {}
        self._functions: list[Any] = []  # graphs call them as long as the engine lives
        self.refits = 0
        self.inputs, self.outputs = self._graph.inputs, self._graph.outputs
        self.output_shapes = self._graph.output_shapes

    def enqueue(
        self, stream: int, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        refits = self.refits

        def call(_: Any) -> None:
            if refits != self.refits:
                report("a graph runs that was captured before weights were refitted")
            feeds = {n: view(addresses[n], shapes[n], d).copy() for n, d in self.inputs.items()}
            values = self._session.run(list(self.outputs), feeds)
            for (name, dtype), value in zip(self.outputs.items(), values, strict=True):
                view(addresses[name], shapes[name], dtype)[...] = value

        function = HOST_FUNCTION(call)
        self._functions.append(function)
        address = ctypes.cast(function, ctypes.c_void_p).value
        ask(driver.cuLaunchHostFunc(stream, driver.CUhostFn(address), 0))

    def refit(self, weights: Mapping[str, tuple[str, int, int]]) -> None:
        self._weights |= {
            name: view(address, self._graph.initializers[name][0], dtype).copy()
            for name, (dtype, address, _) in weights.items()
        }
        self.refits += 1
        self._values = {n: ort.OrtValue.ortvalue_from_numpy(w) for n, w in self._weights.items()}
        self._session = open_session(self._path, self._values)

    def prototype(self, name: str) -> tuple[str, int]:
        shape, kind = self._graph.initializers[name]
        return onnx.helper.tensor_dtype_to_np_dtype(kind).name, int(np.prod(shape))
