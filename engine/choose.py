"""Which backend runs: what was asked for, or the first that works here, with the reason."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdrt.bundle import Bundle
from sdrt.errors import BackendError, UsageError

from .protocol import Engine

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "openvino", "torch")
PRECISIONS = ("auto", "exact")
SMALL = 500_000_000  # bytes of a bundle that OpenVINO's longer start does not pay for


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a bundle.

    why_not: None if it works here, else the reason in words a person can act on
    load: opens one component of a bundle
    reduced: the name of its lower precision, used for the bundles that admit it; None if it has
        none here
    because: why this one was chosen, filled in by `choose`
    """

    backend: str
    device: str
    why_not: str | None
    load: Callable[[Bundle, str], Engine] | None = None
    because: str = ""
    reduced: str | None = None

    @property
    def title(self) -> str:
        return f"{self.backend} on {self.device}"


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def candidates() -> list[Candidate]:
    """Every backend in the order in which `auto` tries them."""
    return [
        Candidate("tensorrt", "cuda", _tensorrt_reason("tensorrt")),
        Candidate("tensorrt-rtx", "cuda", _tensorrt_reason("tensorrt_rtx")),
        Candidate("onnxruntime", "cuda", *_ort("CUDAExecutionProvider")),
        *_torch_candidates(("cuda", "mps")),
        _openvino(),
        Candidate("onnxruntime", "cpu", *_ort("CPUExecutionProvider")),
        *_torch_candidates(("cpu",)),
    ]


def has_nvidia_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/nvhost-gpu").exists()


def _tensorrt_reason(module: str) -> str:
    if not has_nvidia_gpu():
        return "no NVIDIA GPU on this machine"
    if not installed(module):
        return f"{module} is not installed; pip install 'sdrt[gpu]'"
    return "plans are not built by this version yet"


def _ort(provider: str) -> tuple[str | None, Callable[[Bundle, str], Engine] | None]:
    if not installed("onnxruntime"):
        return "onnxruntime is not installed; pip install 'sdrt[cpu]'", None
    if provider == "CUDAExecutionProvider" and not has_nvidia_gpu():
        return "no NVIDIA GPU on this machine", None

    def load(bundle: Bundle, name: str) -> Engine:
        from .ort import OrtEngine

        graph = bundle.graph(name)
        return OrtEngine(name, graph, bundle.manifest.components[name], provider)

    if provider == "CPUExecutionProvider":
        return None, load
    from . import ort

    return ort.available(provider), load


def _openvino() -> Candidate:
    reduced = "openvino-bf16" if cpu_has_bf16() else None

    def load(bundle: Bundle, name: str) -> Engine:
        from .openvino_cpu import OpenVinoEngine

        precision = "bf16" if reduced and reduced in bundle.manifest.admitted else "f32"
        component = bundle.manifest.components[name]
        return OpenVinoEngine(name, bundle.graph(name), component, precision)

    missing = None if installed("openvino") else "openvino is not installed; pip install openvino"
    return Candidate("openvino", "cpu", missing, load, reduced=reduced)


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _torch_candidates(devices: tuple[str, ...]) -> list[Candidate]:
    def load(device: str) -> Callable[[Bundle, str], Engine]:
        def load_component(bundle: Bundle, name: str) -> Engine:
            from .sdpa import TorchEngine

            graph = bundle.graph(name)
            return TorchEngine(name, graph, bundle.manifest.components[name], device)

        return load_component

    return [Candidate("torch", d, _torch_reason(d), load(d)) for d in devices]


def _torch_reason(device: str) -> str | None:
    for module in ("torch", "onnx"):
        if not installed(module):
            return f"{module} is not installed; pip install 'sdrt[build]'"
    if device == "cuda" and not has_nvidia_gpu() and not Path("/dev/kfd").exists():
        return "no NVIDIA or AMD GPU on this machine"
    if device == "mps" and sys.platform != "darwin":
        return "not a Mac"
    if device == "cpu":
        return None
    from .sdpa import available

    return available(device)


def choose(backend: str = "auto", size: int = SMALL) -> Candidate:
    """The candidate to use for a bundle of so many bytes; raises BackendError with every reason if
    none fits.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is unknown; one of: {', '.join(BACKENDS)}")
    refused: dict[str, list[str]] = {}
    for candidate in candidates():
        if backend not in ("auto", candidate.backend):
            continue
        if backend == "auto" and candidate.backend == "openvino" and size < SMALL:
            reason = "its longer start pays for large models only"
            refused.setdefault(reason, []).append(candidate.title)
            continue
        if candidate.why_not is None:
            return replace(candidate, because=_reasons(refused) or "the first choice")
        refused.setdefault(candidate.why_not, []).append(candidate.title)
    raise BackendError(f"no backend can run here: {_reasons(refused)}; type sdrt doctor")


def _reasons(refused: Mapping[str, Sequence[str]]) -> str:
    """Each reason once, with the backends that it rules out."""
    return "; ".join(f"{why}, so not {', '.join(titles)}" for why, titles in refused.items())
