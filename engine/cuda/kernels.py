"""The CUDA kernels of a sampling program: their source, and how they are launched.

Knows CUDA's driver API. The source is compiled at run time for the GPU at hand; the tests compile
it for every supported GPU, and run it on the CPU. Not yet run on a GPU.
"""

import ctypes
from typing import Any

from cuda.bindings import driver

from sdrt.errors import BackendError

from .compiler import compile_cuda
from .driver import Device

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
# One thread per element of an image's latents: it stores the model's output, mixes the image's
# columns by the evaluation's coefficients, and writes the model's next input.
ADVANCE = """
extern "C" __global__ void advance_images(
    const float* coefficients,  // [images, columns] of this mixture
    const float* timesteps,     // [images] of the next evaluation
    float* history,             // [images, columns, size]
    const REAL* output,         // [images, rows, size]; null before the first evaluation
    REAL* sample,               // [images, next_rows, stride]; null after the last
    float* timestep,            // [images, next_rows]
    int images, int columns, int size, int stride,
    int rows, int next_rows, int columns_per_output, int output_column, int state_column)
{
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)images * size) return;
    int image = (int)(at / size), element = (int)(at % size);
    float* own = history + (long long)image * columns * size + element;
    if (output) {
        const REAL* value = output + (long long)image * rows * size + element;
        if (columns_per_output == 2 && rows == 2) own[(long long)output_column * size] = to_float(value[0]);
        own[(long long)(output_column + columns_per_output - 1) * size] = to_float(value[(long long)(rows - 1) * size]);
    }
    const float* coefficient = coefficients + (long long)image * columns;
    float sum = 0.0f;
    for (int column = 0; column < columns; column++)
        if (coefficient[column] != 0.0f) sum += coefficient[column] * own[(long long)column * size];
    own[(long long)state_column * size] = sum;
    if (!sample) return;
    for (int i = 0; i < next_rows; i++) {
        long long row = (long long)image * next_rows + i;
        sample[row * stride + element] = from_float(sum);
        if (element == 0) timestep[row] = timesteps[image];
    }
}
"""  # noqa: E501
# Weighting tokens preserves the mean of a prompt's context, which is summed up first: one thread
# per token.
SUM_TOKENS = """
extern "C" __global__ void sum_tokens(
    const REAL* contexts,    // [chunks, layers, tokens, width]
    float* sums,             // [chunks, tokens]
    int chunks, int layers, int layer, int tokens, int width)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= chunks * tokens) return;
    int chunk = at / tokens, token = at % tokens;
    const REAL* from = contexts + (((long long)chunk * layers + layer) * tokens + token) * width;
    float sum = 0.0f;
    for (int i = 0; i < width; i++) sum += to_float(from[i]);
    sums[at] = sum;
}
"""
# One thread per element of the context that the model reads.
WRITE_CONTEXT = """
extern "C" __global__ void write_context(
    const REAL* contexts,    // [unique chunks, layers, tokens, width]
    const float* sums,       // [unique chunks, tokens]
    const int* indices,      // [images, stored_rows, chunks], into the unique chunks
    const float* weights,    // [images, stored_rows, chunks, tokens]
    REAL* context,           // [images, rows, chunks * tokens, width]; the last rows
    int images, int stored_rows, int rows, int chunks, int layers, int layer, int tokens, int width)
{
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (long long)images * rows * chunks * tokens * width) return;
    int element = (int)(at % width), token = (int)(at / width % tokens);
    int chunk = (int)(at / width / tokens % chunks);
    int row = (int)(at / width / tokens / chunks);
    int stored = (row / rows * stored_rows + stored_rows - rows + row % rows) * chunks + chunk;
    const float* weight = weights + (long long)stored * tokens;
    const float* sum = sums + (long long)indices[stored] * tokens;
    float plain = 0.0f, weighted = 0.0f;
    for (int i = 0; i < tokens; i++) { plain += sum[i]; weighted += weight[i] * sum[i]; }
    float scale = weighted != 0.0f ? plain / weighted : 1.0f;
    long long from = (((long long)indices[stored] * layers + layer) * tokens + token) * width + element;
    context[at] = from_float(to_float(contexts[from]) * weight[token] * scale);
}
"""  # noqa: E501
WRITE_LATENTS = """
extern "C" __global__ void write_latents(
    const float* result,     // [size]
    REAL* latents,           // [size]
    int* not_finite,         // set to 0
    int size)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at == 0) *not_finite = 0;
    if (at < size) latents[at] = from_float(result[at]);
}
"""
# One thread per pixel. NaN and infinity are reported, for they must not become black.
WRITE_PIXELS = """
extern "C" __global__ void write_pixels(
    const REAL* image,       // [3, size] about [-1, 1]
    unsigned char* pixels,   // [size, 3]
    int* not_finite,
    int size)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= size) return;
    for (int c = 0; c < 3; c++) {
        float value = to_float(image[(long long)c * size + at]);
        if (value - value != 0.0f) *not_finite = 1;
        float unit = fminf(fmaxf(value * 0.5f + 0.5f, 0.0f), 1.0f);
        pixels[(long long)at * 3 + c] = (unsigned char)rintf(unit * 255.0f);
    }
}
"""
PREFIXES = {"float16": HALF, "float32": SINGLE}
BODY = ADVANCE + SUM_TOKENS + WRITE_CONTEXT + WRITE_LATENTS + WRITE_PIXELS
# Every kernel: how many of its parameters are addresses, and how many are integers after them.
PARAMETERS = {
    "advance_images": (6, 9),
    "sum_tokens": (2, 5),
    "write_context": (5, 8),
    "write_latents": (3, 1),
    "write_pixels": (3, 1),
}


def parameter_types(name: str) -> tuple[Any, ...]:
    """The C types of a kernel's parameters."""
    addresses, integers = PARAMETERS[name]
    return (*(ctypes.c_void_p,) * addresses, *(ctypes.c_int,) * integers)


def kernel_source(dtype: str) -> str:
    """The kernels for a model whose inputs and outputs have this dtype."""
    return PREFIXES[dtype] + BODY


class Kernels:
    """All kernels, loaded on a GPU."""

    def __init__(self, device: Device, target: str, dtype: str) -> None:
        self._device = device
        self._module = device.check(
            driver.cuModuleLoadData(compile_cuda(kernel_source(dtype), target))
        )
        try:
            self._functions = {
                name: device.check(driver.cuModuleGetFunction(self._module, name.encode()))
                for name in PARAMETERS
            }
        except BackendError:
            self.close()
            raise

    def close(self) -> None:
        """Unload the module; no launch of it may be pending, in a graph neither."""
        if not self._device.fatal_error:
            self._device.check(driver.cuModuleUnload(self._module))

    def __call__(self, name: str, threads: int, *values: Any) -> None:
        """Launch one; values: its parameters, in order"""
        blocks, stream = -(-threads // THREADS), self._device.stream
        function, arguments = self._functions[name], (tuple(values), parameter_types(name))
        self._device.check(
            driver.cuLaunchKernel(function, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, 0)
        )
