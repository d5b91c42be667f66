"""What `sdrt doctor` says: plain values first, then their text."""

import importlib.metadata
import platform
import shutil
from typing import Any

from sdrt.bundle.store import home
from sdrt.errors import BackendError
from sdrt.process_stats import cpu_count

PACKAGES = (
    *("numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "onnx"),
    *(
        "tensorrt",
        "tensorrt-rtx",
        "cuda-bindings",
        "nvidia-cuda-nvrtc",
        "polygraphy",
        "huggingface_hub",
    ),
)


def diagnose() -> dict[str, Any]:
    """This machine, the packages found and every backend with the reason why it does not work."""
    from sdrt.engine import list_backends, select_backend
    from sdrt.engine.gpu import detect_gpus, free_memory

    machine = detect_gpus()
    try:
        chosen = select_backend()
        taken = chosen.title
        because = "; ".join(f"skipped {title}: {reason}" for title, reason in chosen.skipped)
    except BackendError as error:
        taken, because = None, str(error)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cpu_count(),
        "home": str(home()),
        "free_bytes": shutil.disk_usage(_existing(home())).free,
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": [
            {
                "backend": c.backend,
                "device": c.device,
                "works": c.unavailable_reason is None,
                "reason": c.unavailable_reason,
            }
            for c in list_backends()
        ],
        "driver": machine.driver_version,
        "cuda": ".".join(map(str, machine.cuda_version)) if machine.cuda_version else None,
        "no_gpu": machine.unavailable_reason,
        "gpus": [
            {
                "index": gpu.index,
                "name": gpu.name,
                "sm": gpu.sm,
                "bytes": gpu.memory,
                "free_bytes": free_memory(gpu),
            }
            for gpu in machine.gpus
        ],
        "chosen": taken,
        "chosen_because": because,
    }


def _existing(folder: Any) -> Any:
    while not folder.exists():
        folder = folder.parent
    return folder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def text_from_diagnosis(report: dict[str, Any]) -> str:
    lines = [
        f"Python {report['python']} on {report['platform']}, {report['cores']} cores",
        f"bundles in {report['home']} ({report['free_bytes'] / 1e9:.0f} GB free)",
        "packages: " + ", ".join(f"{k} {v}" for k, v in report["packages"].items() if v),
        *_gpu_lines(report),
        "backends, in the order in which auto tries them:",
    ]
    for entry in report["backends"]:
        mark = "works" if entry["works"] else f"no: {entry['reason']}"
        lines.append(f"  {entry['backend']:13} {entry['device']:5} {mark}")
    lines.append(f"default backend for large models: {report['chosen'] or 'none works'}")
    return "\n".join(lines)


def _gpu_lines(report: dict[str, Any]) -> list[str]:
    if report["no_gpu"]:
        return [f"GPUs: none ({report['no_gpu']})"]
    lines = [f"NVIDIA driver {report['driver'] or 'of unknown version'}, CUDA {report['cuda']}"]
    for gpu in report["gpus"]:
        free = "unknown" if gpu["free_bytes"] is None else f"{gpu['free_bytes'] / 1e9:.1f} GB"
        memory = f"{gpu['bytes'] / 1e9:.1f} GB"
        lines.append(f"  GPU {gpu['index']}: {gpu['name']}, {gpu['sm']}, {memory}, {free} free")
    return lines
