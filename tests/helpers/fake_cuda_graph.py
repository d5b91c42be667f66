"""Torch's CUDA graphs on the CPU: what ran inside a capture runs again at every replay, with the
tensors of the capture and without the Python code that called it.

Shows that a replay reads its inputs and weights where the capture read them. Shows nothing about
what CUDA allows in a capture.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            for old, new in zip(
                tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True
            ):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class FakeStream:
    def wait_stream(self, other):
        assert isinstance(other, FakeStream)


def fake_cuda_graphs(monkeypatch):
    """Patch `torch.cuda`; returns the list of the graphs that are captured."""
    captured, stream = [], FakeStream()

    @contextmanager
    def graph(own, pool, stream, capture_error_mode):
        with own:
            yield
        captured.append(own)

    fakes = {"CUDAGraph": FakeGraph, "graph": graph, "Stream": FakeStream}
    fakes |= {"stream": lambda _: nullcontext(), "current_stream": lambda: stream}
    fakes |= {"graph_pool_handle": lambda: (0, 0)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return captured
