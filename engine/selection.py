"""Which backend runs: what was asked for, or the first that works here, with the reason."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdrt.bundle import Bundle
from sdrt.errors import BackendError, UsageError

from .cpu import has_bf16
from .gpu import Gpu, GpuInventory, detect_gpus
from .protocol import Engine
from .tensorrt.variants import FULL, RTX, why_not

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "openvino", "torch")
PRECISIONS = ("auto", "exact")
OPENVINO_MIN_BYTES = 500_000_000  # bytes of a bundle that OpenVINO's longer start does not pay for


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a bundle.

    why_not: None if it works here, else the reason in words a person can act on
    load: opens one component of a bundle
    reduced: the name of its lower precision, used for the bundles that admit it; None if it has
        none here
    streams: whether it can leave weights with the host
    gpu: the NVIDIA GPU that it runs on, if it does
    because: why this one was chosen, filled in by `select_backend`
    """

    backend: str
    device: str
    unavailable_reason: str | None
    load: Callable[[Bundle, str], Engine] | None = None
    because: str = ""
    reduced_precision: str | None = None
    streams_weights: bool = False
    gpu: Gpu | None = None

    @property
    def title(self) -> str:
        return f"{self.backend} on {self.device}"


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def list_backends(
    machine: GpuInventory | None = None,
    device: int = 0,
    stream: int = 0,
    low_memory: bool = False,
    compile: bool = False,
) -> list[Candidate]:
    """Every backend in the order in which `auto` tries them.

    machine: its NVIDIA GPUs, asked from the driver by default
    device: which of them to use. Raises UsageError if there is no such GPU.
    stream: the address of the caller's CUDA stream to work in, where there is one
    low_memory: weights stay with the host where a backend can stream them
    compile: the torch backend's engines are compiled
    """
    machine = detect_gpus() if machine is None else machine
    if device and not 0 <= device < len(machine.gpus):
        have = ", ".join(f"{gpu.index} {gpu.name}" for gpu in machine.gpus)
        raise UsageError(f"device {device}; here is {have or machine.unavailable_reason}")
    with_stream = [
        _tensorrt(FULL, machine, device, stream, low_memory),
        _tensorrt(RTX, machine, device, stream, low_memory),
        _ort_cuda(machine, device, stream),
    ]
    others = [
        *(_torch(kind, machine, device, compile) for kind in ("cuda", "mps")),
        _openvino(),
        _ort_cpu(),
        _torch("cpu", machine, device, compile),
    ]
    if stream:
        none = "it takes no CUDA stream of the caller's"
        others = [
            replace(other, unavailable_reason=other.unavailable_reason or none) for other in others
        ]
    return with_stream + others


def _gpu(machine: GpuInventory, device: int) -> Gpu | None:
    return machine.gpus[device] if machine.gpus else None


def _cuda(device: int) -> str:
    return f"cuda:{device}" if device else "cuda"


def _tensorrt(
    kind: str, machine: GpuInventory, device: int, stream: int, low_memory: bool
) -> Candidate:
    def load(bundle: Bundle, name: str) -> Engine:
        from .tensorrt.load import load_engine

        return load_engine(bundle, name, kind, machine.gpus[device], stream, streamed=low_memory)

    reason = why_not(kind, machine, device)
    gpu = _gpu(machine, device)
    return Candidate(kind, _cuda(device), reason, load, streams_weights=True, gpu=gpu)


def _ort_cuda(machine: GpuInventory, device: int, stream: int) -> Candidate:
    def load(bundle: Bundle, name: str) -> Engine:
        from .onnxruntime.cpu import initialise
        from .onnxruntime.cuda import load_engine

        initialise()
        return load_engine(bundle, name, machine.gpus[device], stream)

    reason = machine.unavailable_reason
    if not is_installed("onnxruntime"):
        reason = "onnxruntime is not installed; pip install 'sdrt[gpu]'"
    elif reason is None:
        from .onnxruntime.session import available

        reason = available("CUDAExecutionProvider")
    gpu = _gpu(machine, device)
    return Candidate("onnxruntime", _cuda(device), reason, load, gpu=gpu)


def _ort_cpu() -> Candidate:
    def load(bundle: Bundle, name: str) -> Engine:
        from .onnxruntime.cache import optimised
        from .onnxruntime.cpu import OrtEngine, initialise
        from .onnxruntime.session import session_options

        initialise()
        kept = optimised(bundle, name, session_options())
        return OrtEngine(name, bundle.graph(name), bundle.manifest.components[name], kept)

    missing = "onnxruntime is not installed; pip install 'sdrt[cpu]'"
    return Candidate("onnxruntime", "cpu", None if is_installed("onnxruntime") else missing, load)


def _openvino() -> Candidate:
    reduced_precision = "openvino-bf16" if has_bf16() else None

    def load(bundle: Bundle, name: str) -> Engine:
        from .openvino.cache import compiled, initialise
        from .openvino.engine import OpenVinoEngine

        initialise()
        precision = (
            "bf16" if reduced_precision and reduced_precision in bundle.manifest.admitted else "f32"
        )
        kept = compiled(bundle, name, precision)
        component = bundle.manifest.components[name]
        return OpenVinoEngine(name, bundle.graph(name), component, precision, kept)

    missing = (
        None if is_installed("openvino") else "openvino is not installed; pip install openvino"
    )
    return Candidate("openvino", "cpu", missing, load, reduced_precision=reduced_precision)


def _torch(kind: str, machine: GpuInventory, device: int, compile: bool) -> Candidate:
    """kind: cuda (which is AMD's GPUs too), mps or cpu"""
    where = _cuda(device) if kind == "cuda" else kind

    def load(bundle: Bundle, name: str) -> Engine:
        from .torch.engine import TorchEngine, initialise

        initialise()
        component = bundle.manifest.components[name]
        return TorchEngine(name, bundle.graph(name), component, where, compile)

    gpu = _gpu(machine, device) if kind == "cuda" else None
    return Candidate("torch", where, _torch_reason(kind, machine), load, gpu=gpu)


def _torch_reason(kind: str, machine: GpuInventory) -> str | None:
    for module in ("torch", "onnx"):
        if not is_installed(module):
            return f"{module} is not installed; pip install 'sdrt[build]'"
    if kind == "cuda" and machine.unavailable_reason and not Path("/dev/kfd").exists():
        return f"{machine.unavailable_reason}, and no AMD one"
    if kind == "mps" and sys.platform != "darwin":
        return "not a Mac"
    if kind == "cpu":
        return None
    from .torch.engine import available

    return available(kind)


def select_backend(
    backend: str = "auto",
    size: int = OPENVINO_MIN_BYTES,
    *,
    machine: GpuInventory | None = None,
    device: int = 0,
    stream: int = 0,
    low_memory: bool = False,
    compile: bool = False,
    failed: Mapping[str, str] | None = None,
) -> Candidate:
    """The candidate to use for a bundle of so many bytes; raises BackendError with every reason if
    none fits.

    machine, device, stream, low_memory, compile: see `list_backends`
    failed: why those that were tried before, by their titles, did not load
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is unknown; one of: {', '.join(BACKENDS)}")
    if compile and backend != "torch":
        raise UsageError(
            f"compile is for the torch backend alone, not for {backend}: the others compile by "
            "themselves; leave it out, or type --backend torch --compile"
        )
    refused: dict[str, list[str]] = {}
    for candidate in list_backends(machine, device, stream, low_memory, compile):
        if backend not in ("auto", candidate.backend):
            continue
        if backend == "auto" and candidate.backend == "openvino" and size < OPENVINO_MIN_BYTES:
            reason = "its longer start pays for large models only"
            refused.setdefault(reason, []).append(candidate.title)
            continue
        why = candidate.unavailable_reason or (failed or {}).get(candidate.title)
        if why is None:
            return replace(candidate, because=_reasons(refused) or "the first choice")
        refused.setdefault(why, []).append(candidate.title)
    raise BackendError(f"no backend can run here: {_reasons(refused)}; type sdrt doctor")


def _reasons(refused: Mapping[str, Sequence[str]]) -> str:
    """Each reason once, with the backends that it rules out."""
    return "; ".join(f"{why}, so not {', '.join(titles)}" for why, titles in refused.items())
