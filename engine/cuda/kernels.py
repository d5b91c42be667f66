"""The kernels of a run that is one launch, as CUDA source, and how they are launched.

Knows CUDA's driver interface. Compiled at run time for the GPU at hand; the tests compile the same
source for every GPU, and run it on the CPU. Never run on a GPU yet.
"""

import ctypes
from typing import Any

from cuda.bindings import driver

from .driver import Device, compiled

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
# The mean of a prompt's context is kept when its tokens are weighed, so it is summed up first: one
# thread for one token.
SUM_TOKENS = """
extern "C" __global__ void sum_tokens(
    const REAL* contexts,    // [stretches, layers, tokens, width]
    float* sums,             // [stretches, tokens]
    int stretches, int layers, int layer, int tokens, int width)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= stretches * tokens) return;
    int stretch = at / tokens, token = at % tokens;
    const REAL* from = contexts + (((long long)stretch * layers + layer) * tokens + token) * width;
    float sum = 0.0f;
    for (int i = 0; i < width; i++) sum += to_float(from[i]);
    sums[at] = sum;
}
"""
# One thread for one number of the context that the model is fed.
WRITE_CONTEXT = """
extern "C" __global__ void write_context(
    const REAL* contexts,    // [all, layers, tokens, width], of every different stretch
    const float* sums,       // [all, tokens]
    const int* places,       // [pictures, rows, stretches], which stretch is where
    const float* weights,    // [pictures, rows, stretches, tokens]
    REAL* context,           // [pictures, used, stretches * tokens, width]; the last rows
    int pictures, int rows, int used, int stretches, int layers, int layer, int tokens, int width)
{
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)pictures * used * stretches * tokens * width) return;
    int element = (int)(at % width), token = (int)(at / width % tokens);
    int stretch = (int)(at / width / tokens % stretches);
    int line = (int)(at / width / tokens / stretches);
    int place = (line / used * rows + rows - used + line % used) * stretches + stretch;
    const float* weight = weights + (long long)place * tokens;
    const float* sum = sums + (long long)places[place] * tokens;
    float plain = 0.0f, heavier = 0.0f;
    for (int i = 0; i < tokens; i++) { plain += sum[i]; heavier += weight[i] * sum[i]; }
    float kept = heavier != 0.0f ? plain / heavier : 1.0f;
    long long from = (((long long)places[place] * layers + layer) * tokens + token) * width + element;
    context[at] = from_float(to_float(contexts[from]) * weight[token] * kept);
}
"""  # noqa: E501
WRITE_LATENTS = """
extern "C" __global__ void write_latents(
    const float* result,     // [size]
    REAL* latents,           // [size]
    int* bad,                // set to 0
    int size)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at == 0) *bad = 0;
    if (at < size) latents[at] = from_float(result[at]);
}
"""
# One thread for one pixel. What is no number is counted, since it must not become black.
WRITE_PIXELS = """
extern "C" __global__ void write_pixels(
    const REAL* image,       // [3, size] about [-1, 1]
    unsigned char* pixels,   // [size, 3]
    int* bad,
    int size)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= size) return;
    for (int c = 0; c < 3; c++) {
        float value = to_float(image[(long long)c * size + at]);
        if (value - value != 0.0f) *bad = 1;
        float unit = fminf(fmaxf(value * 0.5f + 0.5f, 0.0f), 1.0f);
        pixels[(long long)at * 3 + c] = (unsigned char)rintf(unit * 255.0f);
    }
}
"""
PREFIXES = {"float16": HALF, "float32": SINGLE}
BODY = ADVANCE + SUM_TOKENS + WRITE_CONTEXT + WRITE_LATENTS + WRITE_PIXELS
# Of every kernel: how many of its parameters are addresses, and how many numbers follow.
PARAMETERS = {
    "advance_pictures": (6, 9),
    "sum_tokens": (2, 5),
    "write_context": (5, 8),
    "write_latents": (3, 1),
    "write_pixels": (3, 1),
}


def kinds_of(name: str) -> tuple[Any, ...]:
    """The C types of a kernel's parameters."""
    addresses, numbers = PARAMETERS[name]
    return (*(ctypes.c_void_p,) * addresses, *(ctypes.c_int,) * numbers)


def source_of(dtype: str) -> str:
    """The kernels for a model that takes and makes this dtype."""
    return PREFIXES[dtype] + BODY


class Kernels:
    """All of them, loaded on a GPU."""

    def __init__(self, device: Device, target: str, dtype: str) -> None:
        self._device = device
        self._module = device.ask(driver.cuModuleLoadData(compiled(source_of(dtype), target)))
        self._functions = {
            name: device.ask(driver.cuModuleGetFunction(self._module, name.encode()))
            for name in PARAMETERS
        }

    def __call__(self, name: str, threads: int, *values: Any) -> None:
        """Put one into the stream; values: its parameters, in its order."""
        blocks, stream = -(-threads // THREADS), self._device.stream
        function, arguments = self._functions[name], (tuple(values), kinds_of(name))
        self._device.ask(
            driver.cuLaunchKernel(function, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, 0)
        )
