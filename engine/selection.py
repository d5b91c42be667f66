"""Backend selection: the backend that was asked for, or the first one that works on this machine.

Knows every backend's name and what it needs; imports a backend only when an engine is loaded.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sdrt.bundle import Bundle
from sdrt.errors import BackendError, UsageError

from .cpu import has_bf16
from .gpu import Gpu, GpuInventory, detect_gpus
from .load_options import LoadOptions
from .protocol import Engine
from .tensorrt.variants import FULL, RTX, explain_unavailable

log = logging.getLogger(__name__)
BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "openvino", "torch")
PRECISIONS = ("auto", "exact")
OPENVINO_MIN_BYTES = 500_000_000  # smaller bundles do not make up for OpenVINO's start-up time
LABELS = {
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "PyTorch",
}
PRECISION_LABELS = {"float32": "fp32", "float16": "fp16"}
OPENVINO_BF16 = "openvino-bf16"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend on one device.

    Attributes:
        backend: A name of `BACKENDS`.
        device: `cpu`, `mps`, or `cuda` with the GPU's index where it is not the first.
        unavailable_reason: Why the backend cannot run here; None if it can.
        load: Loads one component of a bundle.
        reduced_precision: The name of a lower precision, used for bundles that were validated with
            it; None if there is none on this machine.
        streams_weights: Whether weights can stay in host memory.
        gpu: The NVIDIA GPU, if the backend runs on one.
        skipped: Backends that come earlier and were skipped, each with the reason; set by
            `select_backend`.
    """

    backend: str
    device: str
    unavailable_reason: str | None
    load: Callable[[Bundle, str], Engine] | None = None
    reduced_precision: str | None = None
    streams_weights: bool = False
    gpu: Gpu | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.backend} on {self.device}"

    @property
    def label(self) -> str:
        """For people: `ONNX Runtime (CPU)`."""
        return f"{LABELS.get(self.backend, self.backend)} ({self.device.upper()})"

    def precision_label(self, bundle: Bundle) -> str:
        """What the UNet computes in: `fp32`, `fp16` or `bf16`; without one, the first component."""
        if self.reduced_precision in bundle.manifest.admitted:
            return str(self.reduced_precision).rpartition("-")[2]
        components = bundle.manifest.components
        dtype = components["unet" if "unet" in components else next(iter(components))].dtype
        return PRECISION_LABELS.get(dtype, dtype)


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def list_backends(
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    gpus: GpuInventory | None = None,
) -> list[Candidate]:
    """List every backend in the order in which `auto` tries them.

    Args:
        options: The device, stream and memory options that engines are loaded with.
        gpus: The NVIDIA GPUs of the machine; by default the driver is asked.

    Raises:
        UsageError: The machine has no GPU `options.device`.
    """
    return [create() for _, create in _creators(options, gpus)]


def _creators(
    options: LoadOptions, gpus: GpuInventory | None
) -> list[tuple[str, Callable[[], Candidate]]]:
    """Every backend's name, and what creates its candidate: finding out why a backend cannot run
    may import it, which takes seconds.
    """
    gpus = detect_gpus() if gpus is None else gpus
    if options.device and not 0 <= options.device < len(gpus.gpus):
        listed = ", ".join(f"{gpu.index} {gpu.name}" for gpu in gpus.gpus)
        available = f"; available: {listed}" if listed else f": {gpus.unavailable_reason}"
        raise UsageError(
            f"there is no GPU {options.device}{available}", hint="`sdrt doctor` lists the GPUs"
        )
    with_stream: list[tuple[str, Callable[[], Candidate]]] = [
        (FULL, partial(_tensorrt, FULL, gpus, options)),
        (RTX, partial(_tensorrt, RTX, gpus, options)),
        ("onnxruntime", partial(_onnxruntime_cuda, gpus, options)),
    ]
    others: list[tuple[str, Callable[[], Candidate]]] = [
        ("torch", partial(_torch, "cuda", gpus, options)),
        ("torch", partial(_torch, "mps", gpus, options)),
        ("openvino", partial(_openvino, options)),
        ("onnxruntime", partial(_onnxruntime_cpu, options)),
        ("torch", partial(_torch, "cpu", gpus, options)),
    ]
    if options.cuda_stream:
        others = [(backend, partial(_without_stream, create)) for backend, create in others]
    return with_stream + others


def _without_stream(create: Callable[[], Candidate]) -> Candidate:
    candidate = create()
    reason = candidate.unavailable_reason or "it cannot run in the caller's CUDA stream"
    return replace(candidate, unavailable_reason=reason)


def _gpu(gpus: GpuInventory, options: LoadOptions) -> Gpu | None:
    return gpus.gpus[options.device] if gpus.gpus else None


def _cuda(options: LoadOptions) -> str:
    return f"cuda:{options.device}" if options.device else "cuda"


def _tensorrt(kind: str, gpus: GpuInventory, options: LoadOptions) -> Candidate:
    def load(bundle: Bundle, name: str) -> Engine:
        from .tensorrt.load import load_engine

        return load_engine(bundle, name, kind, gpus.gpus[options.device], options)

    reason = explain_unavailable(kind, gpus, options.device)
    gpu = _gpu(gpus, options)
    return Candidate(kind, _cuda(options), reason, load, streams_weights=True, gpu=gpu)


def _onnxruntime_cuda(gpus: GpuInventory, options: LoadOptions) -> Candidate:
    def load(bundle: Bundle, name: str) -> Engine:
        from .onnxruntime.cpu import initialise
        from .onnxruntime.cuda import load_engine

        initialise()
        return load_engine(bundle, name, gpus.gpus[options.device], options.cuda_stream)

    reason = gpus.unavailable_reason
    if not is_installed("onnxruntime"):
        reason = "onnxruntime is not installed; pip install 'sdrt[gpu]'"
    elif reason is None:
        from .onnxruntime.session import explain_missing_provider

        reason = explain_missing_provider("CUDAExecutionProvider")
    return Candidate("onnxruntime", _cuda(options), reason, load, gpu=_gpu(gpus, options))


def _onnxruntime_cpu(options: LoadOptions) -> Candidate:
    def load(bundle: Bundle, name: str) -> Engine:
        from .onnxruntime.cache import load_optimised
        from .onnxruntime.cpu import OrtEngine, initialise
        from .onnxruntime.session import session_options

        initialise()
        mapped, optimised = options.map_weights, None
        if not mapped:
            optimised = load_optimised(bundle, name, session_options())
        component = bundle.manifest.components[name]
        return OrtEngine(name, bundle.graph(name), component, optimised, map_weights=mapped)

    missing = "onnxruntime is not installed; pip install 'sdrt[cpu]'"
    return Candidate("onnxruntime", "cpu", None if is_installed("onnxruntime") else missing, load)


def _openvino(options: LoadOptions) -> Candidate:
    reduced = OPENVINO_BF16 if has_bf16() else None

    def load(bundle: Bundle, name: str) -> Engine:
        from .openvino.cache import NO_SHAPES, Shapes, initialise, load_compiled
        from .openvino.engine import OpenVinoEngine
        from .openvino.static_shape import StaticShapeEngine, static_shapes

        initialise()
        precision = "bf16" if reduced and reduced in bundle.manifest.admitted else "f32"
        component = bundle.manifest.components[name]

        def load_shapes(shapes: Shapes = NO_SHAPES) -> OpenVinoEngine:
            cached = load_compiled(bundle, name, precision, shapes)
            return OpenVinoEngine(name, bundle.graph(name), component, precision, cached, shapes)

        size = options.static_size
        shapes = static_shapes(bundle, name, size) if size else None
        if shapes is None:
            return load_shapes()
        return StaticShapeEngine(load_shapes(shapes), shapes, load_shapes)

    missing = "openvino is not installed; pip install openvino"
    reason = None if is_installed("openvino") else missing
    return Candidate("openvino", "cpu", reason, load, reduced_precision=reduced)


def _torch(kind: str, gpus: GpuInventory, options: LoadOptions) -> Candidate:
    """kind: cuda (which includes AMD GPUs), mps or cpu"""
    device = _cuda(options) if kind == "cuda" else kind

    def load(bundle: Bundle, name: str) -> Engine:
        from .torch.engine import TorchEngine, initialise

        initialise()
        component = bundle.manifest.components[name]
        how = options.torch_compile, options.torch_cuda_graphs
        return TorchEngine(name, bundle.graph(name), component, device, *how)

    gpu = _gpu(gpus, options) if kind == "cuda" else None
    reason = _torch_reason(kind, gpus)
    if reason is None and kind != "cuda" and options.torch_cuda_graphs:
        reason = "CUDA graphs need a GPU"
    return Candidate("torch", device, reason, load, gpu=gpu)


def _torch_reason(kind: str, gpus: GpuInventory) -> str | None:
    for module in ("torch", "onnx"):
        if not is_installed(module):
            return f"{module} is not installed; pip install 'sdrt[build]'"
    if kind == "cuda" and gpus.unavailable_reason and not Path("/dev/kfd").exists():
        return f"{gpus.unavailable_reason}, and no AMD GPU"
    if kind == "mps" and sys.platform != "darwin":
        return "not a Mac"
    if kind == "cpu":
        return None
    from .torch.engine import explain_missing_device

    return explain_missing_device(kind)


def check_load_options(backend: str, options: LoadOptions) -> None:
    """Raise UsageError for an unknown backend, or for options that it does not support."""
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if options.torch_compile and backend != "torch":
        raise UsageError(
            f"compile is only for the torch backend, not {backend}: the others always compile",
            hint="leave it out, or pass --backend torch --compile",
        )
    if options.torch_cuda_graphs and backend != "torch":
        raise UsageError(
            f"cuda_graphs is only for the torch backend, not {backend}: the others on CUDA always "
            "capture graphs",
            hint="leave it out, or pass --backend torch --cuda-graphs",
        )
    if options.static_size and backend != "openvino":
        raise UsageError(
            f"static_size is only for the openvino backend, not {backend}",
            hint="leave it out, or pass --backend openvino",
        )


def select_backend(
    backend: str = "auto",
    size: int = OPENVINO_MIN_BYTES,
    options: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    *,
    gpus: GpuInventory | None = None,
    failed: Mapping[str, str] | None = None,
    kind: str | None = None,
) -> Candidate:
    """Select the backend for a bundle.

    Args:
        backend: A name of `BACKENDS`; `auto` takes the first one that works.
        size: The bundle's size in bytes.
        options: See `list_backends`.
        gpus: See `list_backends`.
        failed: Candidates that failed to load, by title, each with the error.
        kind: Of device, `cpu` or `cuda`; None for any.

    Raises:
        UsageError: The backend is unknown, or the options do not fit it.
        BackendError: No backend works; the message has every reason.
    """
    check_load_options(backend, options)
    skipped: list[tuple[str, str]] = []
    for name, create in _creators(options, gpus):
        if backend not in ("auto", name):
            continue
        candidate = create()
        device = candidate.device.partition(":")[0]
        if kind not in (None, device):
            if backend == name:
                skipped.append((candidate.title, f"computes on {device}"))
            continue
        reason = candidate.unavailable_reason or (failed or {}).get(candidate.title)
        if backend == "auto" and candidate.backend == "openvino" and size < OPENVINO_MIN_BYTES:
            reason = f"slower to start; chosen for bundles over {OPENVINO_MIN_BYTES / 1e6:.0f} MB"
        if reason is None:
            return replace(candidate, skipped=tuple(skipped))
        skipped.append((candidate.title, reason))
    titles: dict[str, list[str]] = {}
    for title, reason in skipped:
        titles.setdefault(reason, []).append(title)
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in titles.items())
    hint = "run `sdrt doctor`, or leave the device out" if kind else "run `sdrt doctor`"
    raise BackendError(
        f"no backend can run {f'on {kind}' if kind else 'here'}: {reasons}", hint=hint
    )


def log_selection(candidate: Candidate, bundle: Bundle) -> None:
    """Log the bundle, its precision and the backend in one line; why others were skipped at the
    debug level.
    """
    precision = candidate.precision_label(bundle)
    log.info("%s · %s · %s", bundle.manifest.name, precision, candidate.label)
    for title, reason in candidate.skipped:
        log.debug("skipped %s: %s", title, reason)
