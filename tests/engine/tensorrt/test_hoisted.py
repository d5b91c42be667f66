"""The UNet without the work that no step changes, and that work: plans built by TensorRT for RTX,
which needs no GPU.
"""

import pytest
from hoisted_graphs import PLAIN, derived_bundles, hoisted_graph

from sdrt.engine.tensorrt.builder import parse_network
from sdrt.engine.tensorrt.plans import PlanOptions, get_plan
from sdrt.engine.tensorrt.variants import RTX, get_logger

pytestmark = pytest.mark.trt
trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def count_products(graph):
    """Products of matrices in TensorRT's network, before it fuses."""
    network, _parser = parse_network(trt, trt.Builder(get_logger(trt)), graph)
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    return kinds.count(trt.LayerType.MATRIX_MULTIPLY)


def test_every_graph_is_a_plan_for_cuda_graphs(shapes, tmp_path):
    bundles = derived_bundles(shapes, tmp_path)
    for file, bundle in bundles.items():
        plan = get_plan(bundle, "unet", RTX, None, PlanOptions(("sm_89",)))
        assert plan.key.user_allocation and plan.size > 0, file
    counts = {file: count_products(bundle.graph("unet")) for file, bundle in bundles.items()}
    moved = counts[hoisted_graph.CONTEXT_GRAPH] + counts[hoisted_graph.TIME_GRAPH]
    assert moved > 0
    assert counts[PLAIN] == counts[hoisted_graph.HOISTED_GRAPH] + moved
