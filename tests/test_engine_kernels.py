"""The loop's kernel: compiled for every GPU, and its very source run on the CPU against numpy."""

import ast
import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdrt.errors import BackendError
from sdrt.runtime.loop import Guidance, Run, denoised, plan_of
from sdrt.runtime.samplers.catalogue import config_from_name
from sdrt.runtime.samplers.table import sampler_table
from sdrt.runtime.whole import sampled, schedule_of

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from sdrt.engine import cuda, kernels

SHIM = """
#include <cstdio>
#define __global__
#define __device__
static struct { int x; } blockIdx, blockDim, threadIdx;
"""
HALF = """
typedef unsigned short REAL;
static float to_float(REAL h) { _Float16 f; __builtin_memcpy(&f, &h, 2); return (float)f; }
static REAL from_float(float f) { _Float16 g = (_Float16)f; REAL h; __builtin_memcpy(&h, &g, 2); return h; }
"""  # noqa: E501
LAUNCH = """
extern "C" void launch(float* rows, float* timesteps, float* columns, REAL* output, REAL* sample,
    float* timestep, int pictures, int places, int size, int stride, int used, int next, int per,
    int output_place, int state_place) {
    blockDim.x = 256;
    for (blockIdx.x = 0; blockIdx.x <= pictures * size / 256; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < 256; threadIdx.x++)
            advance_pictures(rows, timesteps, columns, output, sample, timestep, pictures,
                places, size, stride, used, next, per, output_place, state_place);
}
"""


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_it_compiles_for_every_gpu(target, dtype):
    code = cuda.compiled(kernels.source_of(dtype), target)
    assert code.startswith(b"\x7fELF") and b"advance_pictures" in code


def test_what_the_compiler_says_is_in_the_error():
    with pytest.raises(BackendError, match=r"sdrt\.cu\(1\).*undefined"):
        cuda.compiled("__global__ void k() { x = 1; }", "sm_90")


@pytest.fixture(scope="module", params=["float32", "float16"])
def kernel(request, tmp_path_factory):
    """The kernel as a function of the host, by the host's compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("kernel")
    prefix = HALF if request.param == "float16" else kernels.SINGLE
    (folder / "k.cpp").write_text(SHIM + prefix + kernels.ADVANCE + LAUNCH)
    command = [compiler, "-O1", "-fPIC", "-shared", "-std=c++17", str(folder / "k.cpp")]
    done = subprocess.run([*command, "-o", str(folder / "k.so")], capture_output=True, text=True)
    if done.returncode and "_Float16" in done.stderr:
        pytest.skip("this compiler has no half precision")
    assert done.returncode == 0, done.stderr
    launch = ctypes.CDLL(str(folder / "k.so")).launch
    launch.argtypes = [*(ctypes.c_void_p,) * 6, *(ctypes.c_int,) * 9]
    return launch, request.param


class Emulated:
    """A whole run as the GPU's loop does it: the same kernel with the same parameters around the
    model, on the host. What it cannot show is that the launches are right on a GPU.
    """

    def __init__(self, kernel, unet):
        self.launch, self.dtype = kernel
        self.unet = unet

    def sampled(self, schedule):
        from sdrt.engine.trt_loop import feeds_of

        pictures, places, *shape = schedule.columns.shape
        size, count = int(np.prod(shape)), len(schedule.used)
        columns, rows = schedule.columns.copy(), np.ascontiguousarray(schedule.rows)
        timesteps = np.ascontiguousarray(schedule.timesteps)
        fed = {
            used: {
                name: np.ascontiguousarray(value, self.dtype if name == "sample" else value.dtype)
                for name, value in feeds_of(schedule, used).items()
            }
            for used in set(schedule.used)
        }
        output = None
        for k in range(count + 1):
            after = fed[schedule.used[k]] if k < count else None
            if k:
                feeds = fed[schedule.used[k - 1]]
                made = self.unet({**feeds, "sample": feeds["sample"].astype(np.float32)})["output"]
                output = np.ascontiguousarray(made, self.dtype)
            self.launch(
                rows[k].ctypes.data,
                timesteps[min(k, count - 1)].ctypes.data,
                columns.ctypes.data,
                output.ctypes.data if k else 0,
                after["sample"].ctypes.data if after else 0,
                after["timestep"].ctypes.data if after else 0,
                *(pictures, places, size),
                int(np.prod(after["sample"].shape[1:])) if after else size,
                schedule.used[k - 1] if k else 1,
                schedule.used[k] if after else 1,
                schedule.per,
                schedule.output_places[k - 1] if k else 0,
                schedule.state_places[k],
            )
        return columns[:, schedule.state_places[-1]]


def model(feeds):
    """A stand-in for a network: every row of its own, from all of its inputs."""
    sample = feeds["sample"]
    shift = (
        feeds["timestep"][:, None, None, None] / 1000
        + feeds["context"].mean((1, 2))[:, None, None, None]
    )
    return {"output": np.tanh(sample[:, :4] * 0.3 + shift + 0.1 * sample[:, 4:].sum(1)[:, None])}


def runs_of(scheduler, scales, pictures, beside=0, clip=False):
    config = config_from_name(scheduler, {"_class_name": "DDIMScheduler", "clip_sample": clip})
    table = sampler_table(config, len(scales))
    scales = np.resize(scales, table.evaluations)
    guidance, rng = Guidance(scales), np.random.default_rng(0)
    plan = plan_of(table, guidance)
    shape = (4, 6, 5)
    guided = 2 if (scales != 1.0).any() else 1
    return [
        Run(
            table,
            guidance,
            plan,
            [rng.normal(size=shape).astype(np.float32) for _ in range(1 + table.noises)],
            {"context": rng.normal(size=(guided, 7, 3)).astype(np.float32)},
            rng.normal(size=(beside, *shape[1:])).astype(np.float32),
        )
        for _ in range(pictures)
    ]


@pytest.mark.parametrize(
    ("scheduler", "scales", "pictures", "beside"),
    [
        ("DDIMScheduler", [7.5] * 5, 1, 0),
        ("PNDMScheduler", [7.5] * 6, 3, 0),
        ("UniPCMultistepScheduler", [1.0] * 6, 2, 0),
        ("EulerAncestralDiscreteScheduler", [1.0, 7.5, 7.5, 1.0, 1.0, 3.0], 2, 5),
        ("HeunDiscreteScheduler", [4.0] * 4, 2, 1),
        ("LMSDiscreteScheduler", [7.5] * 9, 2, 0),
    ],
)
def test_a_whole_run_by_the_kernel_is_the_loops(kernel, scheduler, scales, pictures, beside):
    arguments = scheduler, scales, pictures, beside
    *_, last = denoised(model, runs_of(*arguments))
    found = sampled(Emulated(kernel, model), runs_of(*arguments))
    error = np.abs(found - last.latents).max() / np.abs(last.latents).max()
    assert error < (2e-2 if kernel[1] == "float16" else 1e-5)


def test_runs_that_are_no_table_or_begun_are_not_handed_over():
    runs = runs_of("DDIMScheduler", [7.5] * 3, 2)
    assert schedule_of(runs) is not None
    other = runs_of("DDIMScheduler", [7.5] * 3, 1)
    assert schedule_of([*runs, *other]) is None
    rescaled = runs_of("DDIMScheduler", [7.5] * 3, 1)
    rescaled[0].guidance = replace(rescaled[0].guidance, rescale=0.7)
    assert schedule_of(rescaled) is None
    assert schedule_of(runs_of("DDIMScheduler", [7.5] * 3, 1, clip=True)) is None
    next(iter(denoised(model, runs)))
    assert schedule_of(runs) is None
    assert sampled(model, runs_of("DDIMScheduler", [7.5] * 3, 1)) is None


def test_pictures_come_out_whole_where_the_engine_can(pipe, kernel):
    if kernel[1] == "float16":
        pytest.skip("the embedded bundle is fp32")
    unet = pipe.engines["unet"]
    handed = []

    class Whole(Emulated):
        inputs, outputs = unet.inputs, unet.outputs

        def __call__(self, feeds):
            raise AssertionError("nobody looked, so no step was wanted")

        def sampled(self, schedule):
            handed.append(schedule.used)
            return super().sampled(schedule)

    other = replace(pipe, engines={**pipe.engines, "unet": Whole(kernel, unet)})
    options = {"num_inference_steps": 6, "seed": [3, 4], "num_images_per_prompt": 2}
    options["guidance_interval"] = (0.0, 0.5)
    wanted = pipe("a red circle on a blue background", **options).images
    found = other("a red circle on a blue background", **options).images
    assert handed == [(2, 2, 2, 2, 1, 1, 1)]
    for a, b in zip(wanted, found, strict=True):
        assert np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1


def attributes(path, base):
    """Names that a file takes from a variable."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == base:
            yield node.attr


def test_every_function_of_the_driver_is_there():
    engine = Path(cuda.__file__).parent
    for base in ("driver", "nvrtc"):
        module = getattr(cuda, base)
        names = {n for f in ("cuda.py", "kernels.py") for n in attributes(engine / f, base)}
        assert len(names) > 5 and [name for name in names if not hasattr(module, name)] == []
