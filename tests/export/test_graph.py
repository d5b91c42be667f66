"""How modules become graphs."""

import pytest
import torch
from torch import nn

from sdrt.export.graph import export_graph
from sdrt.export.layers import Downsample


@pytest.mark.exports
def test_sides_that_are_halved_three_times_are_traced_once(tmp_path, monkeypatch):
    traces, trace = [], torch.export.export

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(Downsample(2, symmetric=False) for _ in range(3)))

        def forward(self, image):
            return self.layers(image)

    def count(module, *arguments, **options):
        traces.append(module)
        return trace(module, *arguments, **options)

    monkeypatch.setattr(torch.export, "export", count)
    axes = {"image": {0: "rows", 2: "height", 3: "width"}}
    inputs, outputs = export_graph(
        Encoder().eval(), {"image": torch.zeros(2, 2, 32, 32)}, ("mean",), axes, tmp_path
    )
    assert len(traces) == 1
    assert inputs[0].shape == ("rows", 2, "height", "width") and outputs[0].shape[:2] == ("rows", 2)
