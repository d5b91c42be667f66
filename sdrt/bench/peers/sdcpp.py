"""Peers whose pipelines are C++: a picture is one call, and the library tells what its parts took.

Knows the packages' interfaces and what they read; the packages are imported in a worker only.
"""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdrt.bench.worker import PROMPT, Part, Spent, Timed, picture_of
from sdrt.bundle import Bundle, parse_size
from sdrt.errors import BackendError

from . import checkpoint_folder

GUIDANCE = 7.5
SAID = re.compile(
    rb"(get_learned_condition|sampling|decode_first_stage) completed, taking ([\d.]+)s"
)
PARTS = {b"get_learned_condition": "text", b"sampling": "unet", b"decode_first_stage": "decode"}
# Samplers by this project's names. An evaluation a step costs the same by whichever sampler.
CPP_METHODS = {
    "DPM++ 2M": "dpm++2m",
    "Euler": "euler",
    "Euler a": "euler_a",
    "Heun": "heun",
    "DPM2": "dpm2",
    "LCM": "lcm",
}
GENAI_METHODS = {
    "DPM++ 2M": "EULER_DISCRETE",  # which it has not
    "Euler": "EULER_DISCRETE",
    "Euler a": "EULER_ANCESTRAL_DISCRETE",
    "DDIM": "DDIM",
    "PLMS": "PNDM",
    "LCM": "LCM",
}


def prepare(backend: str, bundle: Bundle, folder: Path) -> None:
    """What a peer in C++ reads in place of the bundle's checkpoint, which is no part of its start;
    nothing for any other backend. Raises BackendError.
    """
    checkpoint = checkpoint_folder(bundle)
    if checkpoint and backend == "stable-diffusion.cpp":
        write_readable(checkpoint, folder)
    if checkpoint and backend == "openvino-genai":
        command = [sys.executable, "-m", "sdrt.bench.peers.ir_export", str(checkpoint), str(folder)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing was said"]
            raise BackendError(f"its models could not be exported: {said[-1]}")


def write_readable(checkpoint: Path, folder: Path) -> None:
    """A checkpoint as stable-diffusion.cpp reads it: the names of the text encoder's weights begin
    with `text_model.`, as transformers wrote them until its version 5.
    """
    for part in ("unet", "vae", "text_encoder"):
        (folder / part).mkdir()
        file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        source = (checkpoint / part / f"{file}.safetensors").resolve()
        target = folder / part / f"{file}.safetensors"
        if part == "text_encoder":
            _write_named(source, target)
        else:
            target.symlink_to(source)


def _write_named(source: Path, target: Path) -> None:
    with source.open("rb") as file, target.open("wb") as out:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        bare = ("text_model.", "__metadata__")
        named = {n if n.startswith(bare) else f"text_model.{n}": at for n, at in header.items()}
        text = json.dumps(named).encode()
        text += b" " * (-len(text) % 8)
        out.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(file, out)


def stable_diffusion_cpp(wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
    """stable-diffusion.cpp as it comes, on all processors; by DPM++ 2M where no sampler is named.

    It says what it spent in hundredths of a second; what it calls sampling is the UNet's
    evaluations and the arithmetic between them. Raises BackendError for a sampler it has not.
    """
    import stable_diffusion_cpp as library

    method = _method(wanted["scheduler"] or "DPM++ 2M", CPP_METHODS)
    processors = len(os.sched_getaffinity(0))
    pipe = library.StableDiffusion(
        model_path=wanted["made"], vae_decode_only=True, n_threads=processors, verbose=False
    )

    def listen(_level: int, text: bytes, _data: object) -> None:
        if said := SAID.search(text):
            spent[PARTS[said[1]]] += float(said[2])

    heard = library.sd_log_callback(listen)
    library.sd_set_log_callback(heard, None)
    width, height = parse_size(wanted["size"])
    given = {"width": width, "height": height, "cfg_scale": GUIDANCE, "sample_method": method}

    def picture(count: int, _kept: object = heard) -> None:
        image = pipe.generate_image(prompt=PROMPT, sample_steps=count, **given)[0]
        Timed(image.save, "PNG", spent)(io.BytesIO(), "PNG")

    return {picture_of(count): partial(picture, count) for count in wanted["steps"]}


def openvino_genai(wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
    """OpenVINO GenAI as it comes: it computes in what it prefers on this processor.

    It tells what each evaluation took. Raises BackendError for a sampler it has not.
    """
    import openvino_genai as library
    from PIL import Image

    pipe = library.Text2ImagePipeline(wanted["made"], "CPU")
    if wanted["scheduler"]:
        kind = getattr(library.Scheduler.Type, _method(wanted["scheduler"], GENAI_METHODS))
        config = Path(wanted["made"]) / "scheduler" / "scheduler_config.json"
        pipe.set_scheduler(library.Scheduler.from_config(config, kind))
    width, height = parse_size(wanted["size"])
    given = {"width": width, "height": height, "guidance_scale": GUIDANCE}

    def picture(count: int) -> None:
        pixels = pipe.generate(PROMPT, num_inference_steps=count, **given).data[0]
        told = pipe.get_performance_metrics()
        spent["text"] += sum(told.get_text_encoder_infer_duration().values()) / 1e3
        spent["unet"] += sum(told.raw_metrics.unet_inference_durations) / 1e6
        spent["decode"] += told.get_vae_decoder_infer_duration() / 1e3
        Timed(Image.fromarray(pixels).save, "PNG", spent)(io.BytesIO(), "PNG")

    return {picture_of(count): partial(picture, count) for count in wanted["steps"]}


def _method(name: str, methods: Mapping[str, str]) -> str:
    if name not in methods:
        raise BackendError(f"it has no sampler {name}; it is measured with {', '.join(methods)}")
    return methods[name]
