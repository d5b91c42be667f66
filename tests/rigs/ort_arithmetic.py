"""ONNX Runtime on the CPU as the arithmetic of `runtime_rig`: host functions in the driver's
streams, which on the driver's stand-in may read and write the device's memory.
"""

import ctypes
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


class OrtArithmetic:
    """A graph of a bundle."""

    def __init__(self, graph: Path) -> None:
        self._graph, self._weights = graph, {}
        self._functions: list[Any] = []  # graphs call them as long as the engine lives
        self._shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
        self.refits = 0
        model = onnx.load(graph, load_external_data=False)
        self._initializers = {i.name: (tuple(i.dims), i.data_type) for i in model.graph.initializer}
        self._open()
        self.inputs = {i.name: DTYPES[i.type] for i in self._session.get_inputs()}
        self.outputs = {o.name: DTYPES[o.type] for o in self._session.get_outputs()}

    def _open(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._values = {n: ort.OrtValue.ortvalue_from_numpy(w) for n, w in self._weights.items()}
        if self._values:  # read before the graph is optimised, unlike `add_initializer`'s
            options.add_external_initializers(list(self._values), list(self._values.values()))
        providers = ["CPUExecutionProvider"]
        self._session = ort.InferenceSession(str(self._graph), options, providers=providers)

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = tuple(shapes.items())
        if key not in self._shapes:
            feeds = {n: np.zeros(shapes[n], dtype) for n, dtype in self.inputs.items()}
            values = self._session.run(list(self.outputs), feeds)
            self._shapes[key] = {n: v.shape for n, v in zip(self.outputs, values, strict=True)}
        return self._shapes[key]

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
            name: view(address, self._initializers[name][0], dtype).copy()
            for name, (dtype, address, _) in weights.items()
        }
        self.refits += 1
        self._open()

    def prototype(self, name: str) -> tuple[str, int]:
        shape, kind = self._initializers[name]
        return onnx.helper.tensor_dtype_to_np_dtype(kind).name, int(np.prod(shape))
