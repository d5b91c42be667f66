"""Every tensor is where its nodes read it: graphs on torch's `meta` device, in place of a GPU."""

import pytest
import torch
from meta_device import run_on_meta

from sdrt.bundle import open_bundle
from sdrt.engine.torch import ops
from sdrt.engine.torch.placement import place_constants

pytestmark = pytest.mark.integration
LENGTHS = {
    "rows": 2,
    "latent_height": 4,
    "latent_width": 4,
    "image_tokens": 4,
    "height": 32,
    "width": 32,
}
# Where the second text encoder of XL gathers, it joins row numbers, which are shapes, to positions.
COPIES = {"text_encoder_2": 1}


@pytest.mark.parametrize("family", ["shapes", "tiny_bundle", "tiny_xl_bundle"])
def test_no_graph_mixes_devices_or_waits_for_one(family, request):
    bundle = open_bundle(request.getfixturevalue(family))
    for name, component in bundle.manifest.components.items():
        lengths = {**LENGTHS, "tokens": bundle.manifest.max_tokens}
        copies = run_on_meta(name, bundle.graph(name), component, lengths)
        assert copies == COPIES.get(name, 0), name


def test_a_constant_of_two_places_is_stored_in_both():
    nodes = [
        (ops.OPERATIONS["Reshape"], ["x", "both"], ["flat"], {}),
        (ops.OPERATIONS["Add"], ["flat", "both"], ["sum"], {}),
        (ops.OPERATIONS["Shape"], ["sum"], ["shape"], {}),
        (ops.OPERATIONS["Gather"], ["shape", "first"], ["rows"], {}),
        (ops.OPERATIONS["Gather"], ["sum", "first"], ["row"], {}),
    ]
    kinds = ["Reshape", "Add", "Shape", "Gather", "Gather"]
    constants = {"both": torch.tensor([2, 2]), "first": torch.tensor(0)}
    meta = torch.device("meta")
    placed, values = place_constants(nodes, kinds, constants, {"x"}, meta)
    read = [[values[s].device.type for s in sources if s in values] for _, sources, _, _ in placed]
    assert read == [["cpu"], ["meta"], [], ["cpu"], ["meta"]]
    same, values = place_constants(nodes, kinds, constants, {"x"}, torch.device("cpu"))
    assert same == nodes and set(values) == set(constants)
