"""CUDA graphs of a component: at the second call of a shape all its kernels are one launch.

Knows torch; not what it captures. A captured graph reads and writes fixed addresses: its inputs are
copied into buffers of its own, and weights are read where they were, so a graph is dropped when
other weights take their place. Not `torch.compile(mode="reduce-overhead")`, which copies every
argument, the weights too, and belongs to the thread that compiled. Not yet run on a GPU.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Compute = Callable[[Mapping[str, Tensor]], list[Tensor]]


class CudaGraphCache:
    """The graphs of one component, one for each of the last few sets of shapes.

    Args:
        name: The component, for messages.
        max_shapes: How many graphs are stored; the least recently used is evicted.
    """

    def __init__(self, name: str, max_shapes: int) -> None:
        self.name, self._max_shapes = name, max_shapes
        self._graphs: OrderedDict[object, _CapturedGraph] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # a handle, whose type torch does not publish
        self._is_capturable = True

    def run(self, compute: Compute, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute, by a replay where these shapes were captured before.

        Args:
            compute: What is captured: the same for all calls between two `clear`.
            inputs: Tensors on the GPU, by name.

        Returns:
            The outputs, valid until the next call.
        """
        if not self._is_capturable:
            return compute(inputs)
        shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        if (graph := self._graphs.get(shapes)) is not None:
            self._graphs.move_to_end(shapes)
            return graph.replay(inputs)
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        results = self._warm_up(compute, inputs)
        try:
            self._graphs[shapes] = _CapturedGraph(compute, inputs, self._stream, self._pool)
        except RuntimeError as error:  # whatever is not allowed in a capture
            self._is_capturable = False
            log.warning("%s runs without CUDA graphs: %s", self.name, str(error).split("\n")[0])
        while len(self._graphs) > self._max_shapes:
            self._graphs.popitem(last=False)
        return results

    def _warm_up(self, compute: Compute, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute in the stream that is captured: libraries set themselves up in their first call,
        which a capture forbids.
        """
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = compute(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def clear(self) -> None:
        """Drop the graphs: other weights are read, or nothing any more."""
        self._graphs.clear()


class _CapturedGraph:
    """One graph, with its inputs and outputs. Graphs of a component share a memory pool, since the
    outputs of one are read before another runs.
    """

    def __init__(
        self,
        compute: Compute,
        inputs: Mapping[str, Tensor],
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        self._graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads may allocate meanwhile
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode=mode):
            self._outputs = compute(self._inputs)

    def replay(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        self._graph.replay()
        return self._outputs
