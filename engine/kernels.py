"""The one kernel of the denoising loop, as CUDA source, and how it is launched.

Knows CUDA's driver interface. Compiled at run time for the GPU at hand; the tests compile the same
source for every GPU, and run it on the CPU. Never run on a GPU yet.
"""

import ctypes
from typing import Any

from cuda.bindings import driver

from .cuda import Device, compiled

THREADS = 256
HALF = """
typedef unsigned short REAL;
__device__ float to_float(REAL h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ REAL from_float(float f) {
    REAL h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
"""
SINGLE = """
typedef float REAL;
__device__ float to_float(REAL f) { return f; }
__device__ REAL from_float(float f) { return f; }
"""
# One thread for one number of one picture's latents: it keeps what the model made of it, mixes its
# columns by the evaluation's row, and writes what the model is fed next.
ADVANCE = """
extern "C" __global__ void advance_pictures(
    const float* rows,       // [pictures, places] of this mixture
    const float* timesteps,  // [pictures] of the next evaluation
    float* columns,          // [pictures, places, size]
    const REAL* output,      // [pictures, used, size]; null before the first evaluation
    REAL* sample,            // [pictures, next, stride]; null after the last
    float* timestep,         // [pictures, next]
    int pictures, int places, int size, int stride,
    int used, int next, int per, int output_place, int state_place)
{
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)pictures * size) return;
    int picture = (int)(at / size), element = (int)(at % size);
    float* own = columns + (long long)picture * places * size + element;
    if (output) {
        const REAL* made = output + (long long)picture * used * size + element;
        if (per == 2 && used == 2) own[(long long)output_place * size] = to_float(made[0]);
        own[(long long)(output_place + per - 1) * size] = to_float(made[(long long)(used - 1) * size]);
    }
    const float* row = rows + (long long)picture * places;
    float sum = 0.0f;
    for (int place = 0; place < places; place++)
        if (row[place] != 0.0f) sum += row[place] * own[(long long)place * size];
    own[(long long)state_place * size] = sum;
    if (!sample) return;
    for (int i = 0; i < next; i++) {
        long long line = (long long)picture * next + i;
        sample[line * stride + element] = from_float(sum);
        if (element == 0) timestep[line] = timesteps[picture];
    }
}
"""  # noqa: E501
PREFIXES = {"float16": HALF, "float32": SINGLE}
KINDS = (*(ctypes.c_void_p,) * 6, *(ctypes.c_int,) * 9)


def source_of(dtype: str) -> str:
    """The kernel for a model that takes and makes this dtype."""
    return PREFIXES[dtype] + ADVANCE


class Advance:
    """The kernel, loaded on a GPU."""

    def __init__(self, device: Device, target: str, dtype: str) -> None:
        self._device = device
        self._module = device.ask(driver.cuModuleLoadData(compiled(source_of(dtype), target)))
        self._function = device.ask(driver.cuModuleGetFunction(self._module, b"advance_pictures"))

    def __call__(self, *values: Any) -> None:
        """Put it into the stream; values: the kernel's parameters, in its order."""
        pictures, _, size = values[6:9]
        blocks = -(-pictures * size // THREADS)
        stream = self._device.stream
        arguments = (tuple(values), KINDS)
        self._device.ask(
            driver.cuLaunchKernel(
                self._function, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, 0
            )
        )
