"""One contestant in a process of its own: it loads, draws a picture, then times what it is asked.

It is told, as JSON in its only argument: backend, precision, folder, size, steps, scheduler, and
the folder of what was made for it. It speaks JSON, a line each way: first what it can time and how
long loading took; then, for every name of a part that it reads, a turn; at last, for `end`, its
memory. A turn is calls of one part until a fifth of a second is filled, at least one.
"""

import io
import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any, TextIO

import numpy as np

from sdrt.bundle import parse_size
from sdrt.process_stats import Others, memory
from sdrt.runtime import Pipeline

from .timing import PROMPT, Part, Spent, Timed, picture_of

FILLED = 0.2  # seconds of a turn, see `process_stats.Others`
MOST = 100  # calls of a turn


def own(pipe: Pipeline, size: str, steps: list[int], spent: Spent) -> dict[str, Part]:
    """What can be timed of one of this project's pipelines.

    spent: where the parts of a picture add their seconds
    """
    width, height = parse_size(size)
    down, specs = pipe.manifest.downscale, pipe.manifest.components["unet"].inputs
    shapes = {spec.name: spec.shape for spec in specs}
    rng = np.random.default_rng(0)
    rows = (2, int(shapes["sample"][1]), height // down, width // down)
    sample = rng.normal(size=rows).astype(np.float32)
    context = rng.normal(size=(2, pipe.manifest.max_tokens, int(shapes["context"][2])))
    feeds = {
        "sample": sample,
        "timestep": np.full(2, 500, np.float32),
        "context": context.astype(np.float32),
    }
    for name in set(shapes) - set(feeds):
        feeds[name] = np.ones((2, int(shapes[name][1])), np.float32)
    latents = {"latents": sample[:1, : pipe.manifest.latent_channels]}
    texts = [(e.engine, {"input_ids": e.tokenizer(["", PROMPT])}) for e in pipe.text_encoders]
    names = {encoder.name: "text" for encoder in pipe.text_encoders} | {"vae_decoder": "decode"}
    engines = {
        name: Timed(engine, names.get(name, name), spent) for name, engine in pipe.engines.items()
    }
    watched = replace(pipe, engines=engines, chunk_cache={})

    def picture(count: int) -> None:
        watched.chunk_cache.clear()
        image = watched(PROMPT, num_inference_steps=count, size=size, seed=0).images[0]
        Timed(image.save, "PNG", spent)(io.BytesIO(), "PNG")

    parts: dict[str, Part] = {
        "text": lambda: [encoder(ids) for encoder, ids in texts],
        "unet": lambda: pipe.engines["unet"](feeds),
        "decode": lambda: pipe.engines["vae_decoder"](latents),
    }
    if rows[1] == pipe.manifest.latent_channels:
        parts |= {picture_of(count): partial(picture, count) for count in steps}
    return parts


def opened(wanted: dict[str, Any], spent: Spent) -> dict[str, Part]:
    """The parts of a contestant, loaded."""
    backend, precision, folder = wanted["backend"], wanted["precision"], wanted["folder"]
    if backend == "limit":
        from .roofline import products

        return {f"{dtype} {library}": part for dtype, (library, part) in products().items()}
    if backend in ("reference", "optimum"):
        from .peers import diffusers, optimum

        kind = diffusers.reference if backend == "reference" else optimum.optimum
        return kind(folder, wanted, spent)
    if backend in ("stable-diffusion.cpp", "openvino-genai"):
        from .peers import openvino_genai
        from .peers import sdcpp as cpp

        one = backend == "openvino-genai"
        return (openvino_genai.openvino_genai if one else cpp.stable_diffusion_cpp)(wanted, spent)
    from sdrt import load

    pipe = load(folder, backend=backend, precision=precision)
    if wanted["scheduler"]:
        pipe = pipe.with_scheduler(wanted["scheduler"])
    return own(pipe, wanted["size"], wanted["steps"], spent)


def turn(part: Part, spent: Spent, whole: bool) -> dict[str, Any]:
    """Calls of a part until a turn is filled: the seconds of each, what the parts of a whole
    picture took of them, and the share of the processor that others took.
    """
    spent.clear()
    others, seconds = Others(), list[float]()
    while sum(seconds) < FILLED and len(seconds) < MOST:
        began = time.perf_counter()
        part()
        seconds.append(time.perf_counter() - began)
    parts = {name: value / len(seconds) for name, value in spent.items()} if whole else {}
    return {"seconds": seconds, "others": others.share(), "parts": parts}


def work(wanted: dict[str, Any], channel: TextIO) -> None:
    began, spent = time.perf_counter(), Spent(float)
    parts = opened(wanted, spent)
    loaded = time.perf_counter() - began
    # The first picture is the end of a cold start; whoever draws none warms every part.
    pictures = [name for name in parts if name.startswith("picture")]
    for name in pictures[:1] or parts:
        parts[name]()
    say = partial(print, file=channel, flush=True)
    say(json.dumps({"load_seconds": loaded, "parts": list(parts)}))
    for line in sys.stdin:
        if line.strip() == "end":
            say(json.dumps(memory()))
            return
        name = line.strip()
        say(json.dumps(turn(parts[name], spent, name in pictures)))


def main() -> None:
    # What libraries print must not come between the answers.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work(json.loads(sys.argv[1]), channel)
