"""One contestant in a process of its own: it loads, generates an image, then measures what it is
asked to.

Its only argument is JSON: backend, precision, folder, size, whether it is compiled for that, steps,
scheduler, and the folder that `peers.prepare` filled. It answers in JSON, a line each: first the
parts that it can time and how long loading took; then a measurement for every name of a part that
it reads; for `end`, its memory. A measurement repeats one part until a fifth of a second is filled,
at least once.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TextIO

import numpy as np

from sdrt.bundle import parse_size
from sdrt.engine import Feeds
from sdrt.engine.axes import axis_lengths
from sdrt.process_stats import Others, memory
from sdrt.runtime import Pipeline

from .timing import PROMPT, Part, Seconds, image_part, time_engine, timed

MIN_SECONDS = 0.2  # of a measurement, see `process_stats.Others`
MAX_CALLS = 100  # of a measurement
LIMIT_CALLS = 10  # of the limit at least: the first after a while take many times as long


def sdrt_parts(pipe: Pipeline, size: str, steps: list[int], seconds: Seconds) -> dict[str, Part]:
    """The parts of one of this project's pipelines.

    seconds: where the parts of an image add their time
    """
    feeds = unet_feeds(pipe, size)
    latents = {"latents": feeds["sample"][:1, : pipe.manifest.latent_channels]}
    texts = [(e.engine, {"input_ids": e.tokenizer(["", PROMPT])}) for e in pipe.text_encoders]
    titles = {encoder.name: "text" for encoder in pipe.text_encoders} | {"vae_decoder": "decode"}
    engines = {
        name: time_engine(engine, titles.get(name, name), seconds)
        for name, engine in pipe.engines.items()
    }
    timed_pipe = replace(pipe, engines=engines, chunk_cache={})

    def image(count: int) -> None:
        timed_pipe.chunk_cache.clear()
        image = timed_pipe(PROMPT, num_inference_steps=count, size=size, seed=0).images[0]
        with timed("PNG", seconds):
            image.save(io.BytesIO(), "PNG")

    parts: dict[str, Part] = {
        "text": lambda: [encoder(ids) for encoder, ids in texts],
        "unet": lambda: pipe.engines["unet"](feeds),
        "decode": lambda: pipe.engines["vae_decoder"](latents),
    }
    if feeds["sample"].shape[1] == pipe.manifest.latent_channels:
        parts |= {image_part(count): partial(image, count) for count in steps}
    return parts


def unet_feeds(pipe: Pipeline, size: str) -> Feeds:
    """Inputs of the UNet for a guided image: noise, a timestep in the middle, and ones."""
    lengths = axis_lengths(pipe.manifest, parse_size(size), rows=2)
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for spec in pipe.manifest.components["unet"].inputs:
        shape = tuple(lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if spec.name in ("sample", "context"):
            feeds[spec.name] = rng.normal(size=shape).astype(np.float32)
        else:
            value = 500 if spec.name == "timestep" else 1
            feeds[spec.name] = np.full(shape, value, np.float32)
    return feeds


def load_parts(job: dict[str, Any], seconds: Seconds) -> dict[str, Part]:
    """Load a contestant; returns its parts."""
    backend, folder = job["backend"], job["folder"]
    if backend == "limit":
        from .roofline import products

        return {f"{dtype} {library}": part for dtype, (library, part) in products().items()}
    if (load_peer := _peer_loader(backend)) is not None:
        return load_peer(job, seconds)
    from sdrt import load

    size = job["size"] if job["static"] else None
    pipe = load(folder, backend=backend, precision=job["precision"], static_size=size)
    if job["scheduler"]:
        pipe = pipe.with_scheduler(job["scheduler"])
    return sdrt_parts(pipe, job["size"], job["steps"], seconds)


def _peer_loader(backend: str) -> Callable[[dict[str, Any], Seconds], dict[str, Part]] | None:
    """What loads a peer; None for a backend of this project. A peer's package is imported here."""
    if backend in ("reference", "optimum"):
        from .peers import diffusers, optimum

        return diffusers.load if backend == "reference" else optimum.load
    if backend == "openvino-genai":
        from .peers import openvino_genai

        return openvino_genai.load
    if backend == "stable-diffusion.cpp":
        from .peers import sdcpp

        return sdcpp.load
    return None


def measure(part: Part, seconds: Seconds, has_parts: bool, min_calls: int = 1) -> dict[str, Any]:
    """Call a part until a measurement is filled: the seconds of every call, those that the parts of
    an image took of them, and the share of the processor that other processes took.
    """
    seconds.clear()
    others, calls = Others(), list[float]()
    while len(calls) < min_calls or (sum(calls) < MIN_SECONDS and len(calls) < MAX_CALLS):
        began = time.perf_counter()
        part()
        calls.append(time.perf_counter() - began)
    parts = {name: value / len(calls) for name, value in seconds.items()} if has_parts else {}
    return {"seconds": calls, "others": others.busy_fraction(), "parts": parts}


def work(job: dict[str, Any], channel: TextIO) -> None:
    began, seconds = time.perf_counter(), Seconds(float)
    parts = load_parts(job, seconds)
    load_seconds = time.perf_counter() - began
    # A cold start includes the first image; without images every part is called once.
    image_parts = [name for name in parts if name.startswith("picture")]
    for name in image_parts[:1] or parts:
        parts[name]()
    answer = partial(print, file=channel, flush=True)
    answer(json.dumps({"load_seconds": load_seconds, "parts": list(parts)}))
    for line in sys.stdin:
        if line.strip() == "end":
            answer(json.dumps(memory()))
            return
        name = line.strip()
        calls = LIMIT_CALLS if job["backend"] == "limit" else 1
        answer(json.dumps(measure(parts[name], seconds, name in image_parts, calls)))


def main() -> None:
    # What libraries print must not mix with the answers.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work(json.loads(sys.argv[1]), channel)
