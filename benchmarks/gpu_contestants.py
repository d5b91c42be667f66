"""The engines that `gpu.py` compares, and what is timed of each, by name.

Knows this project's pipelines, diffusers' and torch; not how times are taken.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from published import reference_pipeline

from sdrt.bundle import parse_size
from sdrt.engine import list_backends
from sdrt.engine.selection import is_installed

PROMPT = "a lighthouse at dusk"
PARTS = ("text", "unet", "decode", "picture")
Part = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contestant:
    """An engine. backend: None for diffusers; options: of `sdrt.load`"""

    backend: str | None
    options: dict[str, Any]
    ort_cuda: str = ""  # SDRT_ORT_CUDA


COMPILED, GRAPHS = {"compile": True}, {"cuda_graphs": True}
CONTESTANTS = {
    "tensorrt": Contestant("tensorrt", {}),
    "tensorrt-rtx": Contestant("tensorrt-rtx", {}),
    "torch compiled graphs": Contestant("torch", {**COMPILED, **GRAPHS}),
    "torch graphs": Contestant("torch", GRAPHS),
    "torch compiled": Contestant("torch", COMPILED),
    "torch": Contestant("torch", {}),
    "onnxruntime": Contestant("onnxruntime", {}),
    "onnxruntime plain": Contestant("onnxruntime", {}, "fused=0"),
    "diffusers compiled": Contestant(None, COMPILED),
    "diffusers": Contestant(None, {}),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """What is timed. sizes: WIDTHxHEIGHT; rows: of UNet calls; steps: of images"""

    parts: tuple[str, ...] = PARTS
    sizes: tuple[str, ...] = ("512x512",)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    steps: tuple[int, ...] = (20, 50)


def explain_missing(device: str) -> dict[str, str | None]:
    """Every contestant, and why it cannot run on this device (`cuda` or `cpu`); None if it can."""
    reasons: dict[str, str | None] = {
        candidate.backend: candidate.unavailable_reason
        for candidate in reversed(list_backends())
        if candidate.device == device
    }
    reasons[""] = reasons["torch"]
    if not is_installed("diffusers"):
        reasons[""] = "diffusers is not installed"
    answers = {
        name: reasons.get(contestant.backend or "", f"it does not run on {device}")
        for name, contestant in CONTESTANTS.items()
    }
    if device == "cpu":
        no_graphs = {name: "CUDA graphs need a GPU" for name in answers if "graphs" in name}
        answers |= no_graphs | {"onnxruntime plain": "it fuses on CUDA only"}
    return answers


def load_parts(
    name: str, bundle: Path, model: Path, device: str, selection: Selection
) -> dict[str, Part]:
    """Load a contestant; returns what can be timed of it."""
    contestant = CONTESTANTS[name]
    if contestant.backend is None:
        return reference_parts(model, bool(contestant.options), device, selection)
    import sdrt

    os.environ["SDRT_ORT_CUDA"] = contestant.ort_cuda
    pipe = sdrt.load(bundle, backend=contestant.backend, device=device, **contestant.options)
    if not pipe.backend.endswith(device):
        sys.exit(f"{name} fell back to {pipe.backend}")
    return own_parts(pipe, selection)


def own_parts(pipe: Any, selection: Selection) -> dict[str, Part]:
    """What is timed of one of this project's pipelines; every call waits for its result."""
    rng, engines, parts = np.random.default_rng(0), pipe.engines, dict[str, Part]()
    shapes = {spec.name: spec.shape for spec in pipe.manifest.components["unet"].inputs}
    channels, tokens, width = shapes["sample"][1], pipe.manifest.max_tokens, shapes["context"][2]
    if "text" in selection.parts:
        ids = {"input_ids": pipe.tokenizer(["", PROMPT])}
        parts["text encoder"] = partial(engines["text_encoder"], ids)
    for size in selection.sizes:
        sides = [side // pipe.manifest.downscale for side in reversed(parse_size(size))]
        for rows in selection.rows if "unet" in selection.parts else ():
            feeds = {
                "sample": rng.normal(size=(rows, channels, *sides)).astype(np.float16),
                "timestep": np.full(rows, 500, np.float32),
                "context": rng.normal(size=(rows, tokens, width)).astype(np.float16),
            }
            parts[f"UNet {size}, {rows} rows"] = partial(engines["unet"], feeds)
        if "decode" in selection.parts:
            latents = {"latents": rng.normal(size=(1, channels, *sides)).astype(np.float16)}
            parts[f"decode {size}"] = partial(engines["vae_decoder"], latents)
        for count in selection.steps if "picture" in selection.parts else ():
            options: dict[str, Any] = {"num_inference_steps": count, "size": size, "seed": 0}
            complete = partial(pipe, PROMPT, **options)
            parts[f"picture {size}, {count} steps"] = complete
            if pipe.backend.startswith("tensorrt"):  # which has a graph for all steps
                watched = partial(complete, on_step=lambda step: None)
                parts[f"picture {size}, {count} steps, step by step"] = watched
    return parts


def reference_parts(
    model: Path, compiled: bool, device: str, selection: Selection
) -> dict[str, Part]:
    """The same parts of diffusers' pipeline, in float16 on a GPU and float32 on the CPU.

    compiled: with `torch.compile` and channels last, in its default mode
    """
    import torch

    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = reference_pipeline(model, str(dtype).removeprefix("torch.")).to(device)
    if compiled:
        for name in ("unet", "vae"):
            getattr(pipe, name).to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    noise = partial(torch.randn, device=device, dtype=dtype)
    ids = pipe.tokenizer(
        ["", PROMPT], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids.to(device)
    conditioning = ids.shape[1], pipe.unet.config.cross_attention_dim
    parts: dict[str, Part] = {}
    if "text" in selection.parts:
        parts["text encoder"] = partial(pipe.text_encoder, ids)
    for size in selection.sizes:
        width, height = parse_size(size)
        factor = pipe.vae_scale_factor
        shape = (pipe.unet.config.in_channels, height // factor, width // factor)
        timestep = torch.tensor(500.0, device=device)
        for rows in selection.rows if "unet" in selection.parts else ():
            fed = noise((rows, *shape)), timestep, noise((rows, *conditioning))
            parts[f"UNet {size}, {rows} rows"] = partial(pipe.unet, *fed)
        if "decode" in selection.parts:
            parts[f"decode {size}"] = partial(pipe.vae.decode, noise((1, *shape)))
        for count in selection.steps if "picture" in selection.parts else ():
            options = {"num_inference_steps": count, "width": width, "height": height}
            parts[f"picture {size}, {count} steps"] = partial(pipe, PROMPT, **options)
    return {name: partial(wait_for, part, device) for name, part in parts.items()}


def wait_for(part: Part, device: str) -> None:
    """Call a part of torch's and wait until the GPU has done it."""
    import torch

    with torch.inference_mode():
        part()
    if device == "cuda":
        torch.cuda.synchronize()


def measure_ceilings(device: str) -> dict[str, float]:
    """What the device reaches: a product of large matrices of noise, fp16 on a GPU, and a large
    copy.
    """
    import torch

    side, size = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 26)
    dtype = torch.float16 if device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    reached = {}
    for name, part, amount in (
        (f"{str(dtype).removeprefix('torch.')} product, TFLOP/s", lambda: a @ b, side**3 * 2e-12),
        ("copy, GB/s", lambda: target.copy_(source), size * 2e-9),
    ):
        seconds = []
        for _ in range(30 if device == "cuda" else 5):
            began = time.perf_counter()
            wait_for(part, device)
            seconds.append(time.perf_counter() - began)
        reached[name] = amount / float(np.median(seconds[2:]))
    return reached
