"""The parsers of untrusted input, each as a function of bytes, for tools/fuzz.py and the tests.

A target may return or raise an SdrtError, or where a server stands behind it what that answers
with a 4xx; all else is a crash. Knows no fuzzer.
"""

import contextlib
import functools
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from mutating import PASTED
from pydantic import ValidationError
from starlette.formparsers import MultiPartException

import sdrt
from sdrt.bundle import parse_size
from sdrt.bundle.manifest import Component, TensorSpec, manifest_from_json
from sdrt.bundle.onnx_check import check_graph
from sdrt.bundle.safetensors import Tensors
from sdrt.errors import SdrtError
from sdrt.json_validation import read_json
from sdrt.process_stats import forget_peak, peak_bytes, resident_bytes
from sdrt.runtime import Tokenizer
from sdrt.runtime.images import image_from_bytes, image_to_array, parse_parameters, read_parameters
from sdrt.runtime.lora.adapters import parse_lora, read_lora
from sdrt.runtime.prompt_timeline import build_prompt_timeline
from sdrt.runtime.samplers.registry import config_from_name
from sdrt.runtime.samplers.table import sampler_table
from sdrt.runtime.text.prompt_weighting import chunks_from_prompt
from sdrt.serve.errors import ApiError, api_error_from_validation
from sdrt.serve.generation import build_openai_request
from sdrt.serve.routes.openai import _parse_edit_form
from sdrt.serve.routes.sdapi.fields import IGNORED, check_fields
from sdrt.serve.routes.sdapi.options import USED, check_options
from sdrt.serve.routes.sdapi.routes import _prepare, build_sdapi_request
from sdrt.serve.schemas import GenerationRequest, ImageToImageRequest, TextToImageRequest
from sdrt.serve.strict_json import _StrictRequest

WEIGHT = json.dumps({"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()
SIDE = (TensorSpec("x", "float32", ("rows", 4)),), (TensorSpec("y", "float32", ("rows", 4)),)
COMPONENT = Component(*SIDE, "float32", {})
BASE = np.eye(4, dtype=np.float32)
MAX_PIXELS = 256 * 256
BOUNDARY = "sdrt-boundary"
MODEL = SimpleNamespace(
    name="shapes",
    sizes=("64x64",),
    pipe=SimpleNamespace(
        manifest=SimpleNamespace(sizes=((64, 64),)),
        scheduler_config={"_class_name": "DDIMScheduler"},
        tokenizer_2=None,
    ),
)
MODELS = SimpleNamespace(sources={"shapes": None})


@functools.cache
def folder() -> Path:
    """One for all executions of a process, in memory where there is such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="sdrt-fuzz-", dir=memory if memory.is_dir() else None))


def file_of(data: bytes, name: str) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


@functools.cache
def embedded_tokenizer() -> Tokenizer:
    models = Path(sdrt.__file__).parent / "models"
    return Tokenizer.from_folder(models / "shapes" / "tokenizer", 32)


def format_tags(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def driven(coroutine: Any) -> Any:
    """What a coroutine returns that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("the coroutine waits")


def request_of(body: bytes, content_type: str) -> Request:
    sent = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(sent)

    headers = [(b"content-type", content_type.encode())]
    return _StrictRequest({"type": "http", "method": "POST", "headers": headers}, receive)


def safetensors(data: bytes) -> None:
    tensors = Tensors(file_of(data, "tensors.safetensors"))
    for name in tensors:
        tensors[name].sum()
        tensors.shape(name)


def lora(data: bytes) -> None:
    for change in read_lora(file_of(data, "lora.safetensors"), 1.0).changes.values():
        with contextlib.suppress(SdrtError):
            change.merge_delta(np.zeros((), np.float32), (4, 4), 1.0, lambda: BASE)


def graph(data: bytes) -> None:
    """An ONNX file, next to a safetensors file that is right."""
    weights = folder() / "model.safetensors"
    if not weights.exists():
        weights.write_bytes(len(WEIGHT).to_bytes(8, "little") + WEIGHT + bytes(64))
    check_graph(file_of(data, "model.onnx"), COMPONENT)


def manifest(data: bytes) -> None:
    path = file_of(data, "sdrt.json")
    manifest_from_json(read_json(path), path)


def tokenizer_files(data: bytes) -> None:
    names = ("vocab.json", "merges.txt", "tokenizer_config.json")
    for name, part in zip(names, [*data.split(PASTED), b"", b""], strict=False):
        file_of(part, name)
    tokenizer = Tokenizer.from_folder(folder(), 16)
    tokenizer(["a red circle, 3 µm", ""])
    chunks_from_prompt("a ((red):1.2) circle BREAK red", tokenizer)


def image(data: bytes) -> None:
    source = image_from_bytes(data, MAX_PIXELS)
    image_to_array(source, (64, 64))
    parse_parameters(read_parameters(source))


def parameters(data: bytes) -> None:
    parse_parameters(format_tags(data))


def prompt(data: bytes) -> None:
    text = format_tags(data)
    chunks_from_prompt(text, embedded_tokenizer())
    build_prompt_timeline(text, text, 8, 8)


def tokenizer(data: bytes) -> None:
    embedded_tokenizer()([format_tags(data)])


def size(data: bytes) -> None:
    parse_size(format_tags(data))


def names(data: bytes) -> None:
    text = format_tags(data)
    parse_lora(text)
    config_from_name(text, {"_class_name": "DDIMScheduler"})


def scheduler(data: bytes) -> None:
    config = read_json(file_of(data, "scheduler_config.json"))
    sampler_table(config, 3)


def request(data: bytes) -> None:
    """A JSON body as each of the endpoints that make images."""
    body = driven(request_of(data, "application/json").json())
    with contextlib.suppress(ValidationError, SdrtError, ApiError):
        build_openai_request(MODEL, GenerationRequest.model_validate(body), {})  # type: ignore[arg-type]
    with contextlib.suppress(ValidationError, SdrtError, ApiError):
        text = TextToImageRequest.model_validate(body)
        build_sdapi_request(MODEL, text, USED, {})  # type: ignore[arg-type]
        check_fields(text.model_extra or {}, IGNORED)
        check_options(text.override_settings or {}, MODELS)  # type: ignore[arg-type]
    with contextlib.suppress(ValidationError, SdrtError, ApiError):
        _prepare(ImageToImageRequest.model_validate(body), (64, 64))


def form(data: bytes) -> None:
    """A form with files."""
    sent = request_of(data, f"multipart/form-data; boundary={BOUNDARY}")
    try:
        read = driven(sent.form(max_files=4, max_fields=60).__aenter__())
    except MultiPartException:
        return
    try:
        _parse_edit_form(read)
    except RequestValidationError as error:
        json.dumps(api_error_from_validation(error.errors()).body("/v1"), allow_nan=False)
    finally:
        driven(read.close())


# Each with its share of all executions, by how long one takes, and the longest input in bytes.
TARGETS: dict[str, tuple[Callable[[bytes], None], float, int]] = {
    "safetensors": (safetensors, 0.10, 2048),
    "graph": (graph, 0.05, 1024),
    "lora": (lora, 0.03, 2048),
    "manifest": (manifest, 0.08, 4096),
    "tokenizer_files": (tokenizer_files, 0.02, 2048),
    "image": (image, 0.07, 2048),
    "parameters": (parameters, 0.18, 1024),
    "prompt": (prompt, 0.015, 160),
    "tokenizer": (tokenizer, 0.015, 160),
    "size": (size, 0.15, 32),
    "names": (names, 0.01, 48),
    "scheduler": (scheduler, 0.06, 512),
    "request": (request, 0.16, 2048),
    "form": (form, 0.06, 1024),
}


def execute(name: str, data: bytes) -> None:
    """One execution; whatever comes out of it is a crash."""
    with contextlib.suppress(SdrtError, ApiError, ValidationError):
        TARGETS[name][0](data)


def replayed(name: str, inputs: Iterable[bytes]) -> tuple[float, bytes, int]:
    """Processor seconds of the slowest execution, what was sent to it, and the bytes that this
    process grew by at most. What an execution raises names what was sent.
    """
    quiet()
    forget_peak()
    before, slowest = resident_bytes(), (0.0, b"")
    for data in inputs:
        began = time.process_time()
        try:
            execute(name, data)
        except BaseException as error:
            error.add_note(f"sent: {data!r}")
            raise
        slowest = max(slowest, (time.process_time() - began, data))
    return *slowest, peak_bytes() - before


def quiet() -> None:
    """Warnings about strange input are not what is looked for."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
