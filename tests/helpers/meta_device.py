"""Torch's `meta` device in place of a GPU: shapes without values.

Shows that a graph mixes no devices, which raises here as on CUDA, that it reads nothing of the
device, and what it copies there in every call. Shows nothing about values, speed or kernels.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdrt.engine.axes import spec_shape
from sdrt.engine.torch.engine import TorchEngine

MOVES = {torch.ops.aten.to, torch.ops.aten._to_copy}


class CountCopies(TorchDispatchMode):
    """Counts the copies from the host to the device; those back raise by themselves."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in MOVES and args[0].device != result.device:
            self.copies += 1
        return result


@contextmanager
def count_copies():
    with torch.inference_mode(), CountCopies() as mode:
        yield mode


def run_on_meta(name, graph, component, lengths):
    """Run a component with its weights and inputs on the device; returns the number of copies to
    the device while it ran, after checking that the outputs are there.
    """
    engine = TorchEngine(name, graph, component, "meta")
    shapes = {spec.name: spec_shape(spec, lengths) for spec in component.inputs}
    fed = {
        s.name: torch.empty(shapes[s.name], dtype=getattr(torch, s.dtype), device="meta")
        for s in component.inputs
    }
    with count_copies() as counted:
        results = engine._one_by_one(fed, engine._values)
    assert {value.device.type for value in results} == {"meta"}
    return counted.copies
