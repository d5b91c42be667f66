"""What the inputs of an IP-Adapter cost those who use ControlNets alone.

    python benchmarks/image_attention.py --work FOLDER [--size 256x256] [--divisor 4] [--save]

The UNet of Stable Diffusion 1.5 with random weights, exported in FOLDER. Its graph with control
inputs, fed zeros as it is without an image prompt, in turns with the same graph without attention
to image tokens, on ONNX Runtime. Times are of the processor, so that what else runs on the machine
counts little.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
from published import unet_config
from results import save

from sdrt.bundle import parse_size
from sdrt.bundle.manifest import CONTROL, CONTROL_GRAPH, Component
from sdrt.engine.axes import spec_shape
from sdrt.engine.onnxruntime.cpu import OrtEngine
from sdrt.engine.onnxruntime.fusion import write_fused_graph

SIDES = {0: "rows", 2: "2*latent_height", 3: "2*latent_width"}


def export_unet(folder: Path, divisor: int) -> dict[str, OrtEngine]:
    """The graph with control inputs, with and without attention to image tokens."""
    import torch

    from sdrt.export.control_graph import write_control_graph
    from sdrt.export.graph import export_graph
    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    torch.manual_seed(0)
    config = UnetConfig.from_json(unet_config(divisor))
    inputs = {
        "sample": torch.zeros(2, 4, 32, 32),
        "timestep": torch.zeros(2),
        "context": torch.zeros(2, 77, config.cross_attention_dim),
    }
    axes = {"sample": SIDES, "timestep": {0: "rows"}, "context": {0: "rows", 1: "tokens"}}
    if not (folder / "model.onnx").exists():
        export_graph(Unet(config).eval(), inputs, ("output",), axes, folder)
    component = write_control_graph(folder, config, "float32")
    engines = {"with": load(folder, "with", component)}
    with mock.patch("sdrt.export.control_graph.add_image_attention"):
        component = write_control_graph(folder, config, "float32")
    return {**engines, "without": load(folder, "without", component)}


def load(folder: Path, name: str, component: Component) -> OrtEngine:
    """The graph as ONNX Runtime runs it: with fused attention."""
    graph = folder / f"{name}.onnx"
    write_fused_graph(folder / CONTROL_GRAPH, graph, norms=False)
    return OrtEngine(CONTROL, graph, component)


def measure(engines: dict[str, OrtEngine], size: str, rounds: int) -> dict[str, object]:
    """Processor seconds of a guided evaluation, and their ratio."""
    width, height = parse_size(size)
    lengths = {"rows": 2, "tokens": 77, "image_tokens": 1}
    lengths |= {"latent_height": height // 8, "latent_width": width // 8}
    rng, feeds = np.random.default_rng(0), {}
    for spec in engines["with"].inputs:
        shape = spec_shape(spec, lengths)
        is_read = spec.name in ("sample", "context")
        feeds[spec.name] = (rng.normal(size=shape) if is_read else np.zeros(shape)).astype("f")
    feeds["timestep"] += 500
    inputs = {
        name: {spec.name: feeds[spec.name] for spec in engine.inputs}
        for name, engine in engines.items()
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    outputs = {}
    for turn in range(rounds + 1):
        for name in sorted(engines, reverse=bool(turn % 2)):
            began = time.process_time()
            outputs[name] = engines[name](inputs[name])["output"]
            if turn:
                times[name].append(time.process_time() - began)
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    return {
        "processor_seconds": {name: statistics.median(every) for name, every in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_of_least": min(times["with"]) / min(times["without"]),
        "same_bytes": outputs["with"].tobytes() == outputs["without"].tobytes(),
        "rounds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--divisor", type=int, default=4, help="of all widths (default: 4)")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    figures = measure(export_unet(args.work, args.divisor), args.size, args.rounds)
    print(json.dumps({name: of for name, of in figures.items() if name != "rounds"}))
    if args.save:
        width = "" if args.divisor == 1 else f", a {args.divisor}th of the width"
        change = 100 * (float(str(figures["ratio"])) - 1)
        subject = f"an evaluation under control with inputs of an IP-Adapter, {args.size}{width}"
        name = f"image_attention_{args.size}_divisor{args.divisor}"
        save(name, {f"{subject}, against none": f"{change:+.1f} % time"}, figures)


if __name__ == "__main__":
    main()
