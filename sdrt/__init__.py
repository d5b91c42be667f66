"""sdrt: a compiled inference runtime for Stable Diffusion.

    pipe = sdrt.load("shapes")
    images = pipe("a red circle on a blue background", seed=0).images

`load` opens a bundle that `sdrt build` made. Everything raised on purpose is an `SdrtError`.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from .errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ParityError,
    SdrtError,
    UsageError,
)
from .version import __version__

if TYPE_CHECKING:
    from .bundle import Bundle
    from .engine import LoadOptions
    from .runtime import Pipeline

__all__ = [
    "BackendError",
    "BundleError",
    "CheckpointError",
    "ParityError",
    "SdrtError",
    "UsageError",
    "__version__",
    "load",
]


def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: int = 0,
    stream: int = 0,
    low_memory: bool = False,
    compile: bool = False,
) -> Pipeline:
    """A pipeline over a bundle: its name, its folder, or None for the newest.

    backend: auto, tensorrt, tensorrt-rtx, onnxruntime, openvino or torch.
    precision: auto takes a lower one where the build admitted it, exact never does.
    device: which NVIDIA GPU, as CUDA numbers them.
    stream: the address of a CUDA stream of the caller's on it, in which all work is put; of a torch
        stream that is `cuda_stream`. Backends that take none are not chosen.
    low_memory: one component is loaded at a time, when it is needed; TensorRT leaves weights with
        the host that have no room.
    compile: by torch.compile, with backend torch only; the first picture of every size and batch
        waits a minute or more for it.
    A backend that does not load is left, with a warning, for the next that may be taken: auto tries
    every one, a backend that was named is tried on every device it serves.
    Any number of threads may use the pipeline at the same time; see `Pipeline` for what that costs.
    A log line every few seconds names what is loading, and Ctrl-C ends it.
    Raises BundleError if the bundle is missing or damaged, BackendError if nothing can run it,
    UsageError for what does not go together.
    """
    from dataclasses import replace

    from .bundle import open_bundle
    from .engine import PRECISIONS, LoadOptions
    from .progress import log_progress
    from .runtime.parsing import int_parser, invalid_argument, parse_flag, parse_text

    device = int_parser(0, 1023, "the number of a GPU; backend= chooses CPU or GPU")(
        "device", device
    )
    stream = int_parser(0, 2**64 - 1)("stream", stream)
    low_memory, compile = parse_flag("low_memory", low_memory), parse_flag("compile", compile)
    backend, precision = parse_text("backend", backend), parse_text("precision", precision)
    if not isinstance(bundle, str | os.PathLike | None):
        raise invalid_argument("bundle", bundle, "a bundle's name or folder")
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}; expected {' or '.join(PRECISIONS)}")
    with log_progress(lambda: "checking the bundle's files"):
        opened = open_bundle(bundle)
    if precision == "exact":
        opened = replace(opened, manifest=replace(opened.manifest, admitted={}))
    return _load_on_backend(opened, backend, LoadOptions(device, stream, low_memory, compile))


def _load_on_backend(bundle: Bundle, backend: str, options: LoadOptions) -> Pipeline:
    """A pipeline on the first backend that loads."""
    from .engine import log_selection, select_backend
    from .engine.memory_budget import check_memory
    from .runtime import load_pipeline

    log, low_memory = logging.getLogger(__name__), options.low_memory
    failed: dict[str, str] = {}
    while True:
        candidate = select_backend(backend, bundle.bytes, options, failed=failed)
        log_selection(candidate, candidate.precision_label(bundle))
        if options.torch_compile:
            log.warning("torch.compile: the first image of a size and batch takes a minute or so")
        try:
            streamed = low_memory and candidate.streams_weights
            check_memory(bundle, candidate.gpu, low_memory, streamed)
            return load_pipeline(bundle, candidate, low_memory)
        except (BackendError, ParityError) as error:
            log.warning("%s failed to load: %s", candidate.label, error)
            failed[candidate.title] = str(error)
