"""The kernels of a whole run: compiled for every GPU, and their very source run on the CPU against
numpy.
"""

import ast
import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from sampling_states import create_states, evaluate

from sdrt.engine import SamplingResult
from sdrt.errors import BackendError, UsageError
from sdrt.runtime.denoising import denoise
from sdrt.runtime.images import images_from_decoded
from sdrt.runtime.sampling_program import build_sampling_program, run_sampling_program

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from sdrt.engine.cuda import compiler as cuda_compiler
from sdrt.engine.cuda import driver as cuda_driver
from sdrt.engine.cuda import kernels
from sdrt.engine.tensorrt.sampling_graph import unet_feeds, unique_chunks

SHIM = """
#include <cmath>
#define __global__
#define __device__
static struct { int x; } blockIdx, blockDim, threadIdx;
struct Any { void* p; Any(void* p) : p(p) {} template <class T> operator T*() { return (T*)p; } };
"""
HALF = """
typedef unsigned short REAL;
static float to_float(REAL h) { _Float16 f; __builtin_memcpy(&f, &h, 2); return (float)f; }
static REAL from_float(float f) { _Float16 g = (_Float16)f; REAL h; __builtin_memcpy(&h, &g, 2); return h; }
"""  # noqa: E501
LAUNCH = """
extern "C" void launch_{name}(int threads{declared}) {{
    blockDim.x = 256;
    for (blockIdx.x = 0; blockIdx.x * 256 < threads; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < 256; threadIdx.x++)
            {name}({inputs});
}}
"""


def launcher_of(name):
    """A function of the host that calls a kernel for every thread."""
    addresses, numbers = kernels.PARAMETERS[name]
    declared = [f", void* p{i}" for i in range(addresses)] + [f", int n{i}" for i in range(numbers)]
    inputs = [f"(Any)p{i}" for i in range(addresses)] + [f"n{i}" for i in range(numbers)]
    return LAUNCH.format(name=name, declared="".join(declared), inputs=", ".join(inputs))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_the_kernels_compile_for_every_gpu(target, dtype):
    code = cuda_compiler.compile_cuda(kernels.kernel_source(dtype), target)
    assert code.startswith(b"\x7fELF")
    assert all(name.encode() in code for name in kernels.PARAMETERS)


def test_the_compilers_log_is_in_the_error():
    with pytest.raises(BackendError, match=r"sdrt\.cu\(1\).*undefined"):
        cuda_compiler.compile_cuda("__global__ void k() { x = 1; }", "sm_90")


@pytest.fixture(scope="module", params=["float32", "float16"])
def kernel(request, tmp_path_factory):
    """The kernels as one function of the host, by the host's compiler, called as `Kernels` is; and
    their dtype.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("kernel")
    prefix = HALF if request.param == "float16" else kernels.SINGLE
    launchers = "".join(map(launcher_of, kernels.PARAMETERS))
    (folder / "k.cpp").write_text(SHIM + prefix + kernels.BODY + launchers)
    command = [compiler, "-O1", "-fPIC", "-shared", "-std=c++17", str(folder / "k.cpp")]
    done = subprocess.run([*command, "-o", str(folder / "k.so")], capture_output=True, text=True)
    if done.returncode and "_Float16" in done.stderr:
        pytest.skip("this compiler has no half precision")
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "k.so"))

    def launch(name, threads, *values):
        actual = [v.ctypes.data if isinstance(v, np.ndarray) else v for v in values]
        arguments = [kind(v) for kind, v in zip(kernels.parameter_types(name), actual, strict=True)]
        getattr(library, f"launch_{name}")(ctypes.c_int(threads), *arguments)

    return launch, request.param


class Emulated:
    """A program as the GPU runs it: the same kernels with the same parameters around the model, on
    the host. What it cannot show is that the launches are right on a GPU.
    """

    def __init__(self, kernel, unet):
        self.launch, self.dtype = kernel
        self.unet = unet

    def run_program(self, program, encoder, decoder):
        feeds = {rows: self.feeds(program, rows, encoder) for rows in set(program.rows_per_image)}
        history = self.evaluate(program, feeds)
        latents = history[:, program.state_columns[-1]]
        if decoder is None:
            return SamplingResult(latents)
        decoded = [self.decode(np.ascontiguousarray(result), decoder) for result in latents]
        pixels = np.stack([pixels for pixels, _ in decoded])
        return SamplingResult(latents, pixels, [not bad[0] for _, bad in decoded])

    def feeds(self, program, rows, encoder):
        feeds = unet_feeds(program, rows)
        if program.text:
            feeds["context"] = self.context(program.text, rows, encoder)
        half = {name: self.dtype for name in ("sample", "context")}
        return {n: np.ascontiguousarray(v, half.get(n, v.dtype)) for n, v in feeds.items()}

    def context(self, text, rows, encoder):
        ids, indices = unique_chunks(text)
        contexts = np.ascontiguousarray(encoder({"input_ids": ids})["contexts"], self.dtype)
        unique, layers, tokens, width = contexts.shape
        sizes = layers, layers - 1 - text.clip_skip, tokens, width
        sums = np.empty((unique, tokens), np.float32)
        self.launch("sum_tokens", sums.size, contexts, sums, unique, *sizes)
        images, stored_rows, chunks, _ = text.ids.shape
        context = np.empty((images * rows, chunks * tokens, width), self.dtype)
        counts = images, stored_rows, rows, chunks, *sizes
        weights = np.ascontiguousarray(text.weights)
        arrays = contexts, sums, indices, weights, context
        self.launch("write_context", context.size, *arrays, *counts)
        return context

    def decode(self, result, decoder):
        latents, bad = np.empty((1, *result.shape), self.dtype), np.ones(1, np.int32)
        self.launch("write_latents", result.size, result, latents, bad, result.size)
        image = decoder({"latents": latents})["image"]
        return pixels_by_kernel(self.launch, image, self.dtype, bad)

    def evaluate(self, program, feeds):
        images, columns, *shape = program.history.shape
        size, count = int(np.prod(shape)), len(program.rows_per_image)
        history = program.history.copy()
        coefficients = np.ascontiguousarray(program.coefficients)
        timesteps = np.ascontiguousarray(program.timesteps)
        output = None
        for k in range(count + 1):
            after = feeds[program.rows_per_image[k]] if k < count else None
            if k:
                before = feeds[program.rows_per_image[k - 1]]
                single = {**before, "sample": before["sample"].astype(np.float32)}
                output = np.ascontiguousarray(self.unet(single)["output"], self.dtype)
            self.launch(
                "advance_images",
                images * size,
                coefficients[k],
                timesteps[min(k, count - 1)],
                history,
                output if k else 0,
                after["sample"] if after else 0,
                after["timestep"] if after else 0,
                *(images, columns, size),
                int(np.prod(after["sample"].shape[1:])) if after else size,
                program.rows_per_image[k - 1] if k else 1,
                program.rows_per_image[k] if after else 1,
                program.columns_per_output,
                program.output_columns[k - 1] if k else 0,
                program.state_columns[k],
            )
        return history


def pixels_by_kernel(launch, image, dtype, bad):
    """[1, 3, H, W] -> [H, W, 3] uint8, and what the kernel left in `bad`."""
    size = image.shape[2] * image.shape[3]
    pixels = np.empty((*image.shape[2:], 3), np.uint8)
    launch("write_pixels", size, np.ascontiguousarray(image, dtype), pixels, bad, size)
    return pixels, bad


@pytest.mark.parametrize(
    ("scheduler", "scales", "num_images", "extra_channels"),
    [
        ("DDIMScheduler", [7.5] * 5, 1, 0),
        ("PNDMScheduler", [7.5] * 6, 3, 0),
        ("UniPCMultistepScheduler", [1.0] * 6, 2, 0),
        ("EulerAncestralDiscreteScheduler", [1.0, 7.5, 7.5, 1.0, 1.0, 3.0], 2, 5),
        ("HeunDiscreteScheduler", [4.0] * 4, 2, 1),
        ("LMSDiscreteScheduler", [7.5] * 9, 2, 0),
    ],
)
def test_a_program_run_by_the_kernels_equals_the_loop(
    kernel, scheduler, scales, num_images, extra_channels
):
    arguments = scheduler, scales, num_images, extra_channels
    *_, last = denoise({"unet": evaluate}, create_states(*arguments))
    engines = {"unet": Emulated(kernel, evaluate)}
    actual = run_sampling_program(engines, create_states(*arguments), decode=False).latents
    error = np.abs(actual - last.latents).max() / np.abs(last.latents).max()
    assert error < (2e-2 if kernel[1] == "float16" else 1e-5)


def test_runs_that_are_not_linear_or_have_begun_are_no_program():
    runs = create_states("DDIMScheduler", [7.5] * 3, 2)
    assert build_sampling_program(runs) is not None
    other = create_states("DDIMScheduler", [7.5] * 3, 1)
    assert build_sampling_program([*runs, *other]) is None
    rescaled = create_states("DDIMScheduler", [7.5] * 3, 1)
    rescaled[0].guidance = replace(rescaled[0].guidance, rescale=0.7)
    assert build_sampling_program(rescaled) is None
    assert build_sampling_program(create_states("DDIMScheduler", [7.5] * 3, 1, clip=True)) is None
    next(iter(denoise({"unet": evaluate}, runs)))
    assert build_sampling_program(runs) is None
    runs = create_states("DDIMScheduler", [7.5] * 3, 1)
    assert run_sampling_program({"unet": evaluate}, runs, decode=True) is None


def test_pixels_equal_those_of_the_host_bit_for_bit(kernel):
    launch, dtype = kernel
    rng = np.random.default_rng(0)
    image = rng.uniform(-1.2, 1.2, (1, 3, 64, 33))
    image[0, 0, :32] = (np.arange(32 * 33).reshape(32, 33) % 256 + 0.5) / 127.5 - 1  # ties
    image = image.astype(dtype)
    pixels, bad = pixels_by_kernel(launch, image, dtype, np.zeros(1, np.int32))
    assert (pixels == np.asarray(images_from_decoded(image.astype(np.float32))[0])).all()
    assert bad[0] == 0
    for wrong in (np.nan, np.inf, -np.inf):
        image[0, 2, 3, 4] = wrong
        assert pixels_by_kernel(launch, image, dtype, np.zeros(1, np.int32))[1][0] == 1


PROMPT = "a (red:1.4) circle on a [blue] background"
CALLS = {
    "guided for a while": {"num_images_per_prompt": 2, "guidance_interval": (0.0, 0.5)},
    "two texts in chunks": {"negative_prompt": "a square BREAK (green:1.2) BREAK flat"},
    "unguided": {"guidance_scale": 1.0},
    "an image": {"image": Image.new("RGB", (64, 64), "red"), "strength": 0.7},
}


def single_launch(pipe, kernel):
    """The pipeline with a UNet that runs complete programs and nothing else."""

    class Single(Emulated):
        inputs, outputs = pipe.engines["unet"].inputs, pipe.engines["unet"].outputs
        handed: ClassVar = []

        def __call__(self, feeds):
            raise AssertionError("nobody looked, so no step was wanted")

        def run_program(self, program, encoder, decoder):
            self.handed.append((program, decoder))
            return super().run_program(program, encoder, decoder)

    unet = Single(kernel, pipe.engines["unet"])
    return replace(pipe, engines={**pipe.engines, "unet": unet}), unet.handed


@pytest.mark.parametrize("call", CALLS)
def test_an_engine_that_runs_programs_generates_the_same_images(pipe, kernel, call):
    if kernel[1] == "float16":
        pytest.skip("the embedded bundle is fp32")
    other, handed = single_launch(pipe, kernel)
    options = {"num_inference_steps": 5, "seed": 3, **CALLS[call]}
    expected, actual = pipe(PROMPT, **options).images, other(PROMPT, **options).images
    ((program, decoder),) = handed
    assert program.text is not None and "context" not in program.conditioning
    assert decoder is not None
    for a, b in zip(expected, actual, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


def test_what_a_program_cannot_contain_runs_outside_it(pipe, kernel):
    if kernel[1] == "float16":
        pytest.skip("the embedded bundle is fp32")
    other, handed = single_launch(pipe, kernel)
    inputs = np.random.default_rng(0).normal(size=(1, 32, 64)).astype(np.float32)
    width = {s.name: s.shape for s in pipe.engines["unet"].inputs}["context"][2]
    inputs = np.resize(inputs, (1, 32, width))
    options = {"num_inference_steps": 2, "seed": 3, "prompt_embeds": inputs}
    assert other(**options).images == pipe(**options).images
    assert handed[-1][0].text is None and handed[-1][1] is not None
    parts = pipe.manifest.components
    half = {**parts, "text_encoder": replace(parts["text_encoder"], dtype="float16")}
    mixed = replace(other, manifest=replace(pipe.manifest, components=half))
    mixed(PROMPT, num_inference_steps=1)
    assert handed[-1][0].text is None
    other(PROMPT, num_inference_steps=1, size="128x64")
    assert handed[-1][0].text is not None and handed[-1][1] is None
    with pytest.raises(UsageError, match="clip_skip"):
        other(PROMPT, clip_skip=50)


def test_an_overflowing_decoder_runs_again_in_float32(pipe, kernel):
    if kernel[1] == "float16":
        pytest.skip("the embedded bundle is fp32")
    decoder, calls = pipe.engines["vae_decoder"], []

    def overflowing(feeds):
        calls.append(feeds)
        image = decoder(feeds)["image"]
        return {"image": np.full_like(image, np.inf) if len(calls) == 1 else image}

    other, _ = single_launch(pipe, kernel)
    other = replace(other, engines={**other.engines, "vae_decoder": overflowing})
    options = {"num_inference_steps": 2, "seed": 3}
    assert other("a", **options).images == pipe("a", **options).images
    assert len(calls) == 2


def attributes(path, base):
    """Names that a file takes from a variable."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == base:
            yield node.attr


def test_every_driver_function_exists():
    from cuda.bindings import driver, nvrtc

    engine = Path(cuda_driver.__file__).parent
    for base, module in (("driver", driver), ("nvrtc", nvrtc)):
        files = ("driver.py", "kernels.py", "compiler.py")
        names = {n for f in files for n in attributes(engine / f, base)}
        assert len(names) > 5 and [name for name in names if not hasattr(module, name)] == []
