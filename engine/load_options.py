"""How a bundle's engines are loaded, as the caller asked for it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options of `sdrt.load` that backends read.

    Attributes:
        device: The index of an NVIDIA GPU, as CUDA numbers them.
        cuda_stream: The address of the caller's CUDA stream; 0 for a stream of the backend's own.
        low_memory: Components are loaded one at a time, and weights stay in host memory where the
            backend can stream them.
        torch_compile: The torch backend compiles with `torch.compile`.
        torch_cuda_graphs: The torch backend replays CUDA graphs.
        map_weights: ONNX Runtime on the CPU reads weights from the mapped file whenever they are
            used, which is slower; else it holds a packed copy of them in single precision.
        static_size: (width, height) of the images that OpenVINO also compiles the UNet and the
            decoder for, which is faster; None for none.
    """

    device: int = 0
    cuda_stream: int = 0
    low_memory: bool = False
    torch_compile: bool = False
    torch_cuda_graphs: bool = False
    map_weights: bool = False
    static_size: tuple[int, int] | None = None
