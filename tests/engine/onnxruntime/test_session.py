"""What sessions of ONNX Runtime print: nothing that is raised as well, unless more is asked for."""

import subprocess
import sys

import pytest

pytest.importorskip("onnx")
# A graph whose Reshape fails when it runs, which ONNX Runtime logs and raises.
SCRIPT = """
import logging, sys
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto, helper
from sdrt.engine.onnxruntime.session import session_options

logging.getLogger("sdrt").setLevel(sys.argv[1])
x, shape, y = (
    helper.make_tensor_value_info(name, kind, of)
    for name, kind, of in (("x", 1, ["n"]), ("shape", 7, [1]), ("y", 1, ["m"]))
)
node = helper.make_node("Reshape", ["x", "shape"], ["y"])
graph = helper.make_graph([node], "graph", [x, shape], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
session = ort.InferenceSession(model.SerializeToString(), session_options())
try:
    session.run(None, {"x": np.zeros(4, np.float32), "shape": np.array([3], np.int64)})
except Exception as error:
    print("raised", type(error).__name__)
"""


@pytest.mark.parametrize(("level", "prints"), [("INFO", False), ("DEBUG", True)])
def test_lines_of_the_library_are_for_those_who_ask(level, prints):
    command = [sys.executable, "-c", SCRIPT, level]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "raised" in done.stdout
    assert ("onnxruntime" in done.stderr) == prints, done.stderr
