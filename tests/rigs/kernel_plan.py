"""Plans whose engines are kernels of this file, compiled by NVRTC: a stand-in for what TensorRT
computes, on any GPU that CUDA serves, with cuda-bindings, NVRTC and numpy. Everything around the
engine is the product's: memory, streams, capture, the kernels between evaluations.

It shows nothing of TensorRT, whose runtime half is `runtime_rig`.
"""

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import runtime_rig
from cuda.bindings import driver
from runtime_rig import ask

from sdrt.bundle.manifest import Component, TensorSpec
from sdrt.engine.cuda.compiler import compile_cuda
from sdrt.engine.cuda.driver import Device
from sdrt.engine.cuda.kernels import PREFIXES, THREADS
from sdrt.engine.plans import Plan, PlanKey
from sdrt.engine.tensorrt.engine import TrtEngine, TrtUnet
from sdrt.engine.tensorrt.loaded_plan import LoadedPlan
from sdrt.engine.tensorrt.sampling_graph import SamplingGraphCache

TOKENS, WIDTH, LAYERS = 7, 3, 2
SIDES = (6, 5)  # of the latents
UPSCALING = 8
# The numpy functions below are their references.
EVALUATE = """
extern "C" __global__ void evaluate(
    const REAL* sample, const float* timestep, const REAL* context, REAL* output,
    int count, int size, int stride, int width)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int row = at / (4 * size), element = at % (4 * size);
    float shift = 0.0f, extra = 0.0f;
    for (int i = 0; i < width; i++) shift += to_float(context[row * width + i]);
    for (int i = 4 * size + element % size; i < stride; i += size) extra += to_float(sample[row * stride + i]);
    float own = to_float(sample[row * stride + element]);
    output[at] = from_float(tanhf(own * 0.3f + timestep[row] / 1000.0f + shift / width + 0.1f * extra));
}
"""  # noqa: E501
ENCODE = """
extern "C" __global__ void encode(const int* ids, REAL* contexts, int count, int layers, int tokens, int width)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int element = at % width, token = at / width % tokens, layer = at / width / tokens % layers;
    int chunk = at / width / tokens / layers;
    contexts[at] = from_float((float)((ids[chunk * tokens + token] * 7 + layer * 3 + element) % 11) / 11.0f + 0.25f);
}
"""  # noqa: E501
DECODE = """
extern "C" __global__ void decode(
    const REAL* latents, REAL* image, int count, int height, int width)
{
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int x = at % width, y = at / width % height, channel = at / width / height;
    int from = (channel * (height / 8) + y / 8) * (width / 8) + x / 8;
    image[at] = from_float(to_float(latents[from]) * 0.5f);
}
"""


def encode(ids: np.ndarray) -> np.ndarray:
    """[chunks, tokens] -> [chunks, layers, tokens, width]"""
    layers, elements = np.arange(LAYERS)[:, None, None] * 3, np.arange(WIDTH)
    return ((ids[:, None, :, None] * 7 + layers + elements) % 11 / 11 + 0.25).astype(np.float32)


def decode(latents: np.ndarray) -> np.ndarray:
    """[1, 4, h, w] -> [1, 3, H, W]"""
    return (latents[:, :3] * 0.5).repeat(UPSCALING, 2).repeat(UPSCALING, 3)


def sources() -> list[str]:
    """All kernels, for a stand-in of the driver to compile."""
    return [PREFIXES[dtype] + EVALUATE + ENCODE + DECODE for dtype in ("float32", "float16")]


def create_component(name: str, dtype: str, extra_channels: int) -> Component:
    """The inputs and outputs of a UNet, a text encoder or a decoder."""
    rows, sides = "rows", ("latent_height", "latent_width")
    context = TensorSpec("context", dtype, (rows, "tokens", WIDTH))
    inputs: dict[str, tuple[TensorSpec, ...]] = {
        "unet": (
            TensorSpec("sample", dtype, (rows, 4 + extra_channels, *sides)),
            TensorSpec("timestep", "float32", (rows,)),
            context,
        ),
        "text_encoder": (TensorSpec("input_ids", "int32", (rows, TOKENS)),),
        "vae_decoder": (TensorSpec("latents", dtype, (rows, 4, *sides)),),
    }
    outputs = {
        "unet": TensorSpec("output", dtype, (rows, 4, *sides)),
        "text_encoder": TensorSpec("contexts", dtype, (rows, LAYERS, TOKENS, WIDTH)),
        "vae_decoder": TensorSpec("image", dtype, (rows, 3, "height", "width")),
    }
    return Component(inputs[name], (outputs[name],), dtype, {})


class KernelArithmetic:
    """One of the kernels as an engine's arithmetic."""

    def __init__(self, name: str, component: Component, target: str) -> None:
        self._name = name
        self.inputs = {spec.name: spec.dtype for spec in component.inputs}
        self.outputs = {spec.name: spec.dtype for spec in component.outputs}
        source = PREFIXES[component.dtype] + EVALUATE + ENCODE + DECODE
        self._module = ask(driver.cuModuleLoadData(compile_cuda(source, target)))
        kernel = {"unet": b"evaluate", "text_encoder": b"encode", "vae_decoder": b"decode"}[name]
        self._function = ask(driver.cuModuleGetFunction(self._module, kernel))

    def __del__(self) -> None:
        driver.cuModuleUnload(self._module)

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if self._name == "unet":
            rows, _, *sides = shapes["sample"]
            return {"output": (rows, 4, *sides)}
        if self._name == "text_encoder":
            return {"contexts": (shapes["input_ids"][0], LAYERS, TOKENS, WIDTH)}
        _, _, height, width = shapes["latents"]
        return {"image": (1, 3, height * UPSCALING, width * UPSCALING)}

    def _numbers(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The kernel's integers; the first is the number of its threads."""
        if self._name == "unet":
            rows, channels, height, width = shapes["sample"]
            size, context = height * width, shapes["context"]
            return rows * 4 * size, size, channels * size, context[1] * context[2]
        if self._name == "text_encoder":
            return int(np.prod(shapes["contexts"])), LAYERS, TOKENS, WIDTH
        return int(np.prod(shapes["image"])), *shapes["image"][2:]

    def enqueue(
        self, stream: int, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        numbers = self._numbers(shapes)
        values = [addresses[name] for name in (*self.inputs, *self.outputs)]
        kinds = [ctypes.c_void_p] * len(values) + [ctypes.c_int] * len(numbers)
        arguments = ((*values, *numbers), tuple(kinds))
        blocks = -(-numbers[0] // THREADS)
        ask(
            driver.cuLaunchKernel(
                self._function, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, 0
            )
        )

    def prototype(self, name: str) -> tuple[str, int]:
        raise AssertionError("a kernel has no weights")

    def refit(self, weights: Mapping[str, tuple[str, int, int]]) -> None:
        raise AssertionError("a kernel has no weights")


def create_module(target: str, extra_channels: int) -> ModuleType:
    """What `engine/tensorrt` imports as TensorRT for RTX."""
    module = ModuleType("tensorrt_rtx")
    module.__version__ = "1.7.1"
    vars(module).update({k: v for k, v in vars(runtime_rig).items() if not k.startswith("_")})

    class Runtime:
        def __init__(self, logger: object) -> None:
            pass

        def deserialize_cuda_engine(self, content: bytes) -> runtime_rig.Engine:
            plan = json.loads(bytes(content))
            component = create_component(plan["component"], plan["dtype"], extra_channels)
            return runtime_rig.Engine(
                plan, lambda: KernelArithmetic(plan["component"], component, target)
            )

    vars(module)["Runtime"] = Runtime
    return module


def write_plan(folder: Path, name: str, dtype: str, component: Component) -> Plan:
    """A plan's file for one component at up to 8 rows and 4 chunks of text."""
    axes = {
        "rows": (1, 2, 8) if name != "vae_decoder" else (1, 1, 1),
        "tokens": (TOKENS, TOKENS, 4 * TOKENS),
        "latent_height": (SIDES[0],) * 3,
        "latent_width": (SIDES[1],) * 3,
    }
    profile = {
        spec.name: tuple(
            tuple(axes[axis][i] if isinstance(axis, str) else axis for axis in spec.shape)
            for i in range(3)
        )
        for spec in component.inputs
    }
    flags = {"stripped": False, "streamed": False, "user_allocation": True, "refittable": []}
    about = {"component": name, "dtype": dtype, "profiles": [profile], **flags}
    content = json.dumps(about).encode()
    path = folder / f"{name}.plan"
    path.write_bytes(content)
    key = PlanKey(name, "tensorrt-rtx", "0", (), "", "", (profile,), 3, 0, False, "", "")
    return Plan(path, key, hashlib.sha256(content).hexdigest(), len(content), 0.0, 0)


def load_engines(
    folder: Path, device: Device, target: str, dtype: str, extra_channels: int, stream: int = 0
) -> dict[str, TrtEngine]:
    """A UNet, a text encoder and a decoder, whose plans nobody else uses."""
    engines: dict[str, TrtEngine] = {}
    for name in ("unet", "text_encoder", "vae_decoder"):
        component = create_component(name, dtype, extra_channels)
        plan = write_plan(folder, name, dtype, component)
        loaded = LoadedPlan(plan, component, folder, device)
        if name == "unet":
            loaded.sampling_graphs = SamplingGraphCache(loaded, target)
        kind = TrtUnet if name == "unet" else TrtEngine
        engines[name] = kind(name, component, loaded, stream)
    return engines
