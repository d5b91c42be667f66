"""What 8 bits cost a UNet's images, and gain on this processor: is that a precision to offer?

    python benchmarks/quantised.py [--form fp8] [--work FOLDER] [--images 8] [--save]

Static int8 or FP8 (E4M3) by Q/DQ, as ONNX Runtime, OpenVINO (int8) and TensorRT take it: inputs and
weights of products (and of convolutions, as a second kind), weights by channel, inputs by the range
that they had over a sampler's own trajectories. Images of the embedded model are compared with
the exact ones at the same seeds; no processor here multiplies in FP8, so its numbers are rounded to
it and multiplied in float32. With --work FOLDER, whose `bundle` is of full size (see `latency.py`),
one guided evaluation at 256x256 is timed too, in int8.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from results import save

import sdrt
from sdrt.bundle import open_bundle
from sdrt.engine.parity import MIN_IMAGE_PSNR

# Kinds of node, and the least channels on both sides of those that are quantized.
KINDS = {
    "products": (("MatMul", "Gemm"), 0),
    "products and convolutions": (("MatMul", "Gemm", "Conv"), 0),
    "all but the outermost and time layers": (("MatMul", "Conv"), 9),
}
Kind = tuple[tuple[str, ...], int]
PROMPTS = "a red circle on a blue background", "an orange triangle above a black square on white"
Ranges = dict[str, tuple[float, float]]
ENGINES = {"int8": ("onnxruntime", "openvino"), "fp8": ("onnxruntime",)}
FP8 = ml_dtypes.float8_e4m3fn
MAX_VALUE = {"int8": 127, "fp8": float(ml_dtypes.finfo(FP8).max)}  # of a weight over its scale


def quantized_inputs(model: Any, kind: Kind) -> dict[str, str]:
    """Of every node to be quantized, by its output: its input that is no weight."""
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    operators, channels = kind
    return {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type in operators
        and node.input[1] in weights
        and node.input[0] not in weights
        and min(weights[node.input[1]][:2]) >= channels
    }


def calibrated(graph: Path, folder: Path, run: Callable[[Callable[..., Any]], None]) -> Ranges:
    """The least and the largest value of every input of a product or a convolution.

    run: calls what it is given with the feeds of every evaluation
    """
    model = onnx.load(graph, load_external_data=False)
    names = sorted(set(quantized_inputs(model, KINDS["products and convolutions"]).values()))
    for name in names:
        for kind in ("ReduceMin", "ReduceMax"):
            result = f"{name}.{kind}"
            model.graph.node.append(helper.make_node(kind, [name], [result], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, []))
    session = opened(model, graph, folder)
    expected = [output.name for output in model.graph.output]
    actual: dict[str, list[float]] = {name: [] for name in names}

    def call(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = dict(zip(expected, session.run(expected, dict(feeds)), strict=True))
        for name in names:
            actual[name] += [float(values[f"{name}.{kind}"]) for kind in ("ReduceMin", "ReduceMax")]
        return values

    run(call)
    return {name: (min(0.0, *values), max(0.0, *values)) for name, values in actual.items()}


def opened(model: Any, graph: Path, folder: Path) -> ort.InferenceSession:
    """A session of a changed graph, whose weights stay in the file next to the first one."""
    path = graph.with_name(f"{folder.name}.onnx")
    onnx.save(model, path)
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()


def input_marks(form: str, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of an input of this range; TensorRT takes FP8 about zero only."""
    if form == "fp8":
        scale = max(-low, high, 1e-6) / MAX_VALUE[form]
        return np.array(scale, np.float32), np.array(0, FP8)
    scale = np.float32(max(high - low, 1e-6) / 255)
    return np.array(scale), np.array(np.uint8(np.clip(np.rint(-low / scale), 0, 255)))


def rounded(form: str, scaled: np.ndarray) -> np.ndarray:
    """Weights over their scales, in 8 bits."""
    if form == "fp8":
        return scaled.clip(-MAX_VALUE[form], MAX_VALUE[form]).astype(FP8)
    return np.rint(scaled).clip(-MAX_VALUE[form], MAX_VALUE[form]).astype(np.int8)


def quantized(graph: Path, kind: Kind, form: str, ranges: Ranges, out: Path) -> Path:
    """The graph with Q/DQ around the inputs and weights of nodes of a kind, written whole."""
    model = onnx.load(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen = quantized_inputs(model, kind)
    nodes, added, done = [], [], {}

    def q(name: str, scale: np.ndarray, zero: np.ndarray, axis: int | None) -> str:
        """The name of a tensor through a pair of Q and DQ."""
        if name in done:
            return done[name]
        for part, value in (("scale", scale), ("zero", zero)):
            added.append(numpy_helper.from_array(value, f"{name}.{part}"))
        marks = [f"{name}.scale", f"{name}.zero"]
        more = {} if axis is None else {"axis": axis}
        if name in weights:
            complete = numpy_helper.to_array(weights[name])
            shape = [-1 if i == axis else 1 for i in range(complete.ndim)]
            value = rounded(form, complete / scale.reshape(shape))
            added.append(numpy_helper.from_array(value, f"{name}.q"))
        else:
            nodes.append(helper.make_node("QuantizeLinear", [name, *marks], [f"{name}.q"]))
        result = helper.make_node("DequantizeLinear", [f"{name}.q", *marks], [f"{name}.dq"], **more)
        nodes.append(result)
        done[name] = f"{name}.dq"
        return done[name]

    for node in model.graph.node:
        if node.output[0] in chosen:
            weight = numpy_helper.to_array(weights[node.input[1]])
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            axis = 0 if node.op_type == "Conv" or transposed else weight.ndim - 1
            others = tuple(i for i in range(weight.ndim) if i != axis)
            item = np.maximum(np.abs(weight).max(others), 1e-8).astype(np.float32)
            item /= np.float32(MAX_VALUE[form])
            zeros = rounded(form, np.zeros(len(item), np.float32))
            node.input[0] = q(node.input[0], *input_marks(form, *ranges[node.input[0]]), None)
            node.input[1] = q(node.input[1], item, zeros, axis)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(added)
    used = {name for node in nodes for name in node.input}
    cached = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(cached)
    onnx.save(model, out, save_as_external_data=True, location=f"{out.name}.data")
    return out


def rounding(graph: Path) -> Callable[..., dict[str, np.ndarray]]:
    """ONNX Runtime with every Q/DQ run as written; it would put int8 products in FP8's place."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    expected = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(expected, session.run(expected, dict(feeds)), strict=True))


class Quantized:
    """A UNet's engine by a graph with Q/DQ."""

    def __init__(self, like: Any, graph: Path, engine: str, form: str = "int8") -> None:
        self.inputs, self.outputs = like.inputs, like.outputs
        if engine == "openvino":
            from sdrt.engine.openvino.engine import OpenVinoEngine

            self._call = OpenVinoEngine("unet", graph, self, "f32")  # it needs the specs alone
        elif form == "fp8":
            self._call = rounding(graph)
        else:
            from sdrt.engine.onnxruntime.cpu import OrtEngine

            self._call = OrtEngine("unet", graph, self)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._call(feeds)


def generate(pipe: Any, count: int, unet: Any = None, first: int = 100) -> np.ndarray:
    """[N, H, W, 3] of as many seeds, with guidance, by the usual or another UNet."""
    other = replace(pipe, engines={**pipe.engines, "unet": unet}) if unet else pipe
    seeds = list(range(first, first + count // len(PROMPTS)))
    options = {"num_inference_steps": 20, "seed": seeds, "num_images_per_prompt": len(seeds)}
    result = [image for prompt in PROMPTS for image in other(prompt, **options).images]
    return np.stack([np.asarray(image, np.float64) for image in result])


def psnrs(actual: np.ndarray, expected: np.ndarray) -> list[float]:
    errors = ((actual - expected) ** 2).mean((1, 2, 3))
    return [float(value) for value in 10 * np.log10(255.0**2 / np.maximum(errors, 1e-9))]


def calibrated_by_images(pipe: Any, graph: Path, folder: Path) -> Ranges:
    """By trajectories of other seeds than those that are compared."""

    def run(call: Callable[..., Any]) -> None:
        class Unet:
            inputs, outputs = pipe.engines["unet"].inputs, pipe.engines["unet"].outputs
            __call__ = staticmethod(call)

        generate(pipe, 2 * len(PROMPTS), Unet(), first=0)

    return calibrated(graph, folder, run)


def quality(folder: Path, count: int, form: str) -> dict[str, dict[str, Any]]:
    """How near images of the embedded model are, by kind of node and engine."""
    actual = {}
    with sdrt.load("shapes", backend="onnxruntime", precision="exact") as pipe:
        graph = open_bundle("shapes").graph("unet")
        ranges = calibrated_by_images(pipe, graph, folder)
        expected = generate(pipe, count)
        for title, kind in KINDS.items():
            path = quantized(graph, kind, form, ranges, folder / f"{len(actual)}.onnx")
            for engine in ENGINES[form]:
                unet = Quantized(pipe.engines["unet"], path, engine, form)
                item = psnrs(generate(pipe, count, unet), expected)
                actual[f"{engine}, {title}"] = {"psnr_db": item, "least": min(item)}
                print(f"{engine}, {title}: PSNR {min(item):.1f} to {max(item):.1f} dB", flush=True)
    return actual


def speed(work: Path, folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of one guided evaluation of full size, one engine after the other, as they do not fit
    into memory at once.
    """
    rng = np.random.default_rng(0)
    fed = {
        "sample": rng.normal(size=(2, 4, 32, 32)).astype(np.float32),
        "timestep": np.full(2, 500, np.float32),
        "context": rng.normal(size=(2, 77, 768)).astype(np.float32),
    }
    bundle = open_bundle(work / "bundle")
    graph, component = bundle.graph("unet"), bundle.manifest.components["unet"]
    ranges = calibrated(graph, folder, lambda call: call(fed) and None)
    actual = {}
    for title, kind in {"exact": None, **KINDS}.items():
        path = quantized(graph, kind, "int8", ranges, folder / "full.onnx") if kind else graph
        for engine in ("onnxruntime", "openvino"):
            unet = Quantized(component, path, engine)
            unet(fed)
            seconds = []
            for _ in range(rounds):
                began = time.perf_counter()
                unet(fed)
                seconds.append(time.perf_counter() - began)
            del unet
            actual[f"{engine}, {title}"] = {"seconds": seconds}
            print(f"{engine}, {title}: {statistics.median(seconds):.2f} s", flush=True)
    return actual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=ENGINES, default="int8")
    parser.add_argument("--work", type=Path, help="with a bundle of full size, to time it")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    if args.work and args.form != "int8":
        parser.error("--work times int8 only: no processor here multiplies in FP8")
    with TemporaryDirectory() as temporary:
        near = quality(Path(temporary), args.images, args.form)
        fast = speed(args.work, Path(temporary), args.rounds) if args.work else {}
    if args.save:
        claims = {
            f"{args.form} by Q/DQ, {name}: `shapes`, guidance 7.5, 20 steps": (
                f"PSNR {values['least']:.1f} dB minimum of {args.images} images; "
                f"required: {MIN_IMAGE_PSNR:.0f}"
            )
            for name, values in near.items()
        }
        for name, values in fast.items():
            seconds = statistics.median(values["seconds"])
            claims[f"full-size guided UNet evaluation, 256x256, int8: {name}"] = f"{seconds:.2f} s"
        save(args.form, claims, {"quality": near, "speed": fast})


if __name__ == "__main__":
    main()
