"""ONNX Runtime's real CUDA provider takes every graph, with CUDA graphs, plain and fused, over
libraries that compute nothing: see `stub_cuda`.
"""

import json

import onnx
import pytest
from component_graphs import exported, unet_inputs
from onnx import helper
from stub_cuda import build_libraries, explain_missing, run_with_provider
from unet_configs import FAMILIES, THREE

from sdrt.bundle import open_bundle
from sdrt.engine.onnxruntime.fusion import write_fused_graph
from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig

pytestmark = pytest.mark.rig
if explain_missing():
    pytest.skip(explain_missing(), allow_module_level=True)

# Opens every graph as the engine does; writes what was refused.
OPEN = """
import json, sys
from pathlib import Path
from sdrt.engine.onnxruntime.cuda import PROVIDER, OrtCudaOptions, OrtDevice
from sdrt.engine.onnxruntime.session import create_session, session_options
from sdrt.errors import BackendError
settings, refused = OrtCudaOptions().provider_options(OrtDevice()), {}
assert settings["enable_cuda_graph"] == "1"
for graph, derived in json.loads(sys.argv[1]):
    content = Path(derived).read_bytes() if derived else None
    try:
        create_session("x", Path(graph), session_options(), PROVIDER, settings, content)
    except BackendError as error:
        refused[derived or graph] = str(error)
print(json.dumps(refused))
"""
RUN = """
import ctypes, json, sys
import numpy as np
from sdrt.bundle import open_bundle
from sdrt.engine.onnxruntime.cuda import OrtCudaEngine, OrtDevice
bundle = open_bundle(sys.argv[1])
component = bundle.manifest.components["text_encoder"]
engine = OrtCudaEngine("text_encoder", bundle.graph("text_encoder"), component, OrtDevice())
ids, counts = np.zeros((2, component.inputs[0].shape[1]), np.int32), (ctypes.c_long * 4)()
stub, seen = ctypes.CDLL("libcudart.so.13"), []
for _ in range(3):
    engine({"input_ids": ids})
    stub.stub_counts(counts)
    seen.append(list(counts))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    build_libraries(folder)
    return folder


def refused_of(libraries, graphs, folder):
    """What is refused of these graphs and of their fused ones."""
    pairs = []
    for i, graph in enumerate(graphs):
        fused = folder / f"fused-{i}.onnx"
        write_fused_graph(graph, fused)
        pairs += [(str(graph), None), (str(graph), str(fused))]
    return json.loads(run_with_provider(libraries, OPEN, json.dumps(pairs)))


@pytest.mark.parametrize("family", ["shapes", "tiny_bundle", "tiny_xl_bundle"])
def test_every_graph_of_a_bundle_is_taken_with_cuda_graphs(family, request, libraries, tmp_path):
    bundle = open_bundle(request.getfixturevalue(family))
    graphs = [bundle.graph(name) for name in bundle.manifest.components]
    assert len(graphs) >= 4 and refused_of(libraries, graphs, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_unets_is_taken_with_cuda_graphs(family, libraries, tmp_path):
    config = UnetConfig.from_json({**THREE, **FAMILIES[family]})
    graph = exported(tmp_path, "unet", Unet(config), unet_inputs(config))
    assert refused_of(libraries, [graph], tmp_path) == {}


def test_a_search_of_integers_is_refused(libraries, tmp_path):
    """So the stand-in shows what it is here for."""
    nodes = [helper.make_node("ArgMax", ["x"], ["y"], axis=1)]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.INT32, ["rows", 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ["rows", 1])
    opset = [helper.make_opsetid("", 23)]
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "graph", [x], [y]), ir_version=11, opset_imports=opset
        ),
        tmp_path / "model.onnx",
    )
    refused = refused_of(libraries, [tmp_path / "model.onnx"], tmp_path)
    assert refused and all("graph capture" in said for said in refused.values())


def test_a_component_is_captured_once_and_replayed(shapes, libraries):
    first, second, third = json.loads(run_with_provider(libraries, RUN, str(shapes)))
    captures, launches, replays, refused = zip(first, second, third, strict=True)
    assert captures == (1, 1, 1) and refused == (0, 0, 0)
    assert launches[0] > 0 and launches[2] == launches[1]
    assert replays[2] == replays[1] + 1
