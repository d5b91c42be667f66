"""A compiled inference runtime for Stable Diffusion. Start with `load`:

    pipe = sdrt.load("shapes")
    images = pipe("a red circle on a blue background", seed=0).images

    load(bundle=None, *, backend="auto", device=0, ...) -> Pipeline
    Pipeline(prompt, **options) -> Output   the options are those of GenerationOptions
    InflightBatcher(pipe)                   many calls in one batch

`load` opens a bundle that `sdrt build` wrote. Every error that is raised on purpose is an
`SdrtError`: UsageError, BundleError, CheckpointError, BackendError, ParityError,
DeviceLostError, StorageError.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from .errors import (
    BackendError,
    BundleError,
    CheckpointError,
    DeviceLostError,
    ParityError,
    SdrtError,
    StorageError,
    UsageError,
)
from .signatures import explain_arguments
from .version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .bundle import Bundle
    from .engine import LoadOptions
    from .library import (
        BundleInfo,
        build,
        build_controlnet,
        build_ip_adapter,
        build_upscaler,
        bundles,
    )
    from .preprocessors import preprocess
    from .runtime import (
        ArrayOutput,
        GenerationKwargs,
        GenerationOptions,
        LoraWeight,
        Output,
        Pipeline,
        Preview,
        Step,
    )
    from .runtime.batching.engine import InflightBatcher
    from .runtime.batching.request import (
        GeneratedImage,
        RequestCancelled,
        RequestHandle,
        RequestRejected,
    )
    from .upscaler import upscale

__all__ = [  # noqa: RUF022 (what a reader needs first)
    "load",
    "Pipeline",
    "build",
    "build_controlnet",
    "build_ip_adapter",
    "build_upscaler",
    "bundles",
    "preprocess",
    "upscale",
    "BundleInfo",
    "GenerationOptions",
    "GenerationKwargs",
    "Output",
    "ArrayOutput",
    "Step",
    "Preview",
    "LoraWeight",
    "InflightBatcher",
    "RequestHandle",
    "GeneratedImage",
    "RequestCancelled",
    "RequestRejected",
    "SdrtError",
    "UsageError",
    "BundleError",
    "CheckpointError",
    "BackendError",
    "DeviceLostError",
    "ParityError",
    "StorageError",
    "__version__",
]
# Where the names are that are imported when they are first used.
_LAZY = {
    **dict.fromkeys(
        (
            "ArrayOutput",
            "GenerationKwargs",
            "GenerationOptions",
            "LoraWeight",
            "Output",
            "Pipeline",
            "Preview",
            "Step",
        ),
        "sdrt.runtime",
    ),
    **dict.fromkeys(
        (
            *("BundleInfo", "build", "build_controlnet", "build_ip_adapter", "build_upscaler"),
            "bundles",
        ),
        "sdrt.library",
    ),
    "preprocess": "sdrt.preprocessors",
    "upscale": "sdrt.upscaler",
    "InflightBatcher": "sdrt.runtime.batching.engine",
    **dict.fromkeys(
        ("GeneratedImage", "RequestCancelled", "RequestHandle", "RequestRejected"),
        "sdrt.runtime.batching.request",
    ),
}


_BUILT = "is chosen when a bundle is built: see help(sdrt.build)"
_DOWNLOAD = "is for sdrt.build, which downloads; load reads a bundle"
# What users of diffusers pass to `load`, and what to do here.
_INSTEAD = {
    **dict.fromkeys(("torch_dtype", "dtype", "variant"), f"the precision {_BUILT}"),
    **dict.fromkeys(("vae", "unet", "text_encoder", "safety_checker"), f"a component {_BUILT}"),
    **dict.fromkeys(("revision", "cache_dir", "token", "local_files_only"), f"it {_DOWNLOAD}"),
    **dict.fromkeys(("provider", "providers", "engine"), 'use backend="onnxruntime"'),
    **dict.fromkeys(("device_map", "device_id"), 'use device="cuda:0"'),
    **dict.fromkeys(("model", "model_id", "path"), "the first argument is the bundle's name"),
    "scheduler": "use load(...).with_scheduler(...)",
    "use_safetensors": "leave it out: weights are always safetensors",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        hint = "; use sdrt.load(...)" if name.endswith(("Pipeline", "from_pretrained")) else ""
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{hint}",
            name=name,
            obj=sys.modules[__name__],
        )
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@explain_arguments(_INSTEAD)
def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: int | str = 0,
    stream: int = 0,
    low_memory: bool = False,
    compile: bool = False,
    cuda_graphs: bool = False,
    static_size: str | tuple[int, int] | None = None,
    controlnet: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    ip_adapter: str | os.PathLike[str] | None = None,
    refiner: str | os.PathLike[str] | None = None,
    embeddings: Sequence[str | os.PathLike[str]] = (),
) -> Pipeline:
    """Open a bundle and load its engines.

    auto tries every backend; a named backend is tried on every device it serves. One that fails to
    load is skipped with a warning. Any number of threads may use the pipeline; see `Pipeline` for
    what that costs. A log line every few seconds names what is loading, and Ctrl-C stops it.

    Args:
        bundle: Its name or folder; None is the default (see `sdrt use`) or the only one.
        backend: auto, tensorrt, tensorrt-rtx, onnxruntime, openvino or torch.
        precision: auto uses a lower precision where the build allowed it, exact never does.
        device: Which NVIDIA GPU, as CUDA numbers them; "cpu", "cuda" or "cuda:1" also exclude
            backends on other devices.
        stream: The address of a CUDA stream of the caller's on that device, for all work; of a
            torch stream that is `cuda_stream`. Backends that accept none are skipped.
        low_memory: Whether to load one component at a time, when it is used. TensorRT then leaves
            weights that do not fit in the host's memory.
        compile: Whether to use torch.compile, with backend torch only; the first image of every
            size and batch takes a minute or more then.
        cuda_graphs: Whether to replay CUDA graphs, with backend torch on a GPU only: the kernels of
            a component are one launch.
        static_size: Such as "512x512", with backend openvino only: compile the UNet and the decoder
            for guided images of this size, which is often faster. Other sizes work as well, with a
            second copy of the weights; without guidance an evaluation takes as long as with.
        controlnet: ControlNets and T2I-Adapters that `sdrt build --controlnet` wrote, by name or
            folder. A call uses them with `control_image`; each loads when it is first used.
        ip_adapter: An IP-Adapter that `sdrt build --ip-adapter` wrote, by name or folder. A call
            uses it with `ip_adapter_image`.
        refiner: A refiner's bundle, by name or folder: a call with `refiner_switch_at` does the
            last part of its run with it.
        embeddings: Files of textual inversion, each `FILE`, `FILE:WORD` or the name of one in the
            folder `embeddings` of sdrt's home, whose files prompts may also use by name.

    Raises:
        BundleError: If the bundle is missing or damaged.
        BackendError: If no backend can run it.
        CheckpointError: If an embedding cannot be read or does not fit the model.
        UsageError: For arguments that do not fit together.
    """
    from dataclasses import replace

    from .bundle import open_bundle, parse_size
    from .bundle.bundle import check_makes_images
    from .engine import PRECISIONS, LoadOptions
    from .progress import log_progress
    from .runtime.controlnet.net import control_net_from_bundle
    from .runtime.ip_adapter import check_is_ip_adapter
    from .runtime.job import check_output_size
    from .runtime.parsing import (
        int_parser,
        invalid_argument,
        parse_device,
        parse_flag,
        parse_paths,
        parse_size_option,
        parse_text,
    )

    index, kind = parse_device("device", device)
    stream = int_parser(0, 2**64 - 1)("stream", stream)
    flags = {"low_memory": low_memory, "compile": compile, "cuda_graphs": cuda_graphs}
    flags = {name: parse_flag(name, value) for name, value in flags.items()}
    size = None
    if static_size is not None:
        size = parse_size(parse_size_option("static_size", static_size))
    backend, precision = parse_text("backend", backend), parse_text("precision", precision)
    if not isinstance(bundle, str | os.PathLike | None):
        raise invalid_argument("bundle", bundle, "a bundle's name or folder")
    nets = parse_paths("controlnet", controlnet)
    adapters = parse_paths("ip_adapter", ip_adapter) if ip_adapter is not None else ()
    refiners = parse_paths("refiner", refiner) if refiner is not None else ()
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}; expected {' or '.join(PRECISIONS)}")
    with log_progress(lambda: "checking the bundle's files"):
        opened = [open_bundle(name) for name in (bundle, *refiners, *nets, *adapters)]
    check_makes_images(opened[0])
    if size:
        check_output_size(opened[0].manifest, size, "static_size")
    others = opened[1 + len(refiners) :]
    for net in others[: len(nets)]:
        control_net_from_bundle(net)
    for adapter in others[len(nets) :]:
        check_is_ip_adapter(adapter.manifest)
    if precision == "exact":
        opened = [replace(of, manifest=replace(of.manifest, admitted={})) for of in opened]
    words = parse_paths("embeddings", embeddings)
    options = LoadOptions(
        index,
        stream,
        flags["low_memory"],
        torch_compile=flags["compile"],
        torch_cuda_graphs=flags["cuda_graphs"],
        static_size=size,
    )
    second = opened[1] if refiners else None
    others = opened[1 + len(refiners) :]
    pipe = _load_on_backend(opened[0], others, backend, options, kind, second)
    try:
        pipe.embeddings.open(words)
    except BaseException:
        pipe.close()
        raise
    return pipe


def _load_on_backend(
    bundle: Bundle,
    control_bundles: Sequence[Bundle],
    backend: str,
    options: LoadOptions,
    kind: str | None,
    refiner: Bundle | None,
) -> Pipeline:
    """A pipeline on the first backend that loads; kind: of device, where one was asked for."""
    from .engine import log_selection, select_backend
    from .engine.memory_budget import check_memory
    from .runtime import load_pipeline

    log, low_memory = logging.getLogger(__name__), options.low_memory
    failed: dict[str, str] = {}
    while True:
        size = bundle.bytes + (refiner.bytes if refiner else 0)
        candidate = select_backend(backend, size, options, failed=failed, kind=kind)
        log_selection(candidate, bundle)
        if options.torch_compile:
            log.warning("torch.compile: the first image of a size and batch takes a minute or so")
        try:
            streamed = low_memory and candidate.streams_weights
            check_memory(bundle, candidate.gpu, low_memory, streamed, control_bundles, refiner)
            return load_pipeline(bundle, candidate, low_memory, control_bundles, refiner)
        except (BackendError, ParityError) as error:
            log.warning("%s failed to load: %s", candidate.label, error)
            failed[candidate.title] = str(error)
