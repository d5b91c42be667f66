"""What does a guided UNet evaluation save whose keys and values of cross-attention and time biases
were computed before the loop?

    python benchmarks/hoisting.py [--divisor 1,4] [--sizes 256x256,512x512] [--rounds 10]
        [--engines onnxruntime,openvino,torch] [--work FOLDER] [--save]
    python benchmarks/hoisting.py --layers [--sizes 256x256] [--rounds 3] [--save]

The UNet of Stable Diffusion 1.5, its widths over each divisor, with random weights, exported in
FOLDER (full size: 4 GB of disk, 12 GB of memory; kept there if it is named). Two rows of 77 tokens
in float32; the plain graph and the hoisted one in turns. Ratios are of processor time, over all
threads, which other work on the machine disturbs least; the seconds are stored with them. Next to
them stands what leaves the loop of full-size models, counted. `--layers` times only that, at full
size without an export: what eager torch spends in those layers, in 4 GB of memory.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hoisted_graph import CONTEXT_GRAPH, HOISTED_GRAPH, TIME_GRAPH, write_hoisted_graphs
from published import XL_UNET, unet_config
from results import save

from sdrt.bundle import Bundle
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import Component, Manifest
from sdrt.engine import Engine, Feeds, select_backend

ROWS, TOKENS = 2, 77
PLAIN = "model.onnx"
COUNTED = {
    "SD 1.5": (unet_config(), ("256x256", "512x512", "768x768")),
    "SDXL": ({**unet_config(), **XL_UNET}, ("1024x1024",)),
}
Graphs = Mapping[str, Component]  # by file
Turns = dict[str, list[float]]


def exported(folder: Path, divisor: int) -> Graphs:
    """The plain graph, written once for a folder, and those that are derived from it."""
    import torch

    from sdrt.export.graph import export_graph
    from sdrt.export.recipes import RECIPES
    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    config = UnetConfig.from_json(unet_config(divisor))
    axes = next(recipe.axes for recipe in RECIPES if recipe.name == "unet")
    example = {
        "sample": torch.zeros(ROWS, config.in_channels, 32, 32),
        "timestep": torch.zeros(ROWS),
        "context": torch.zeros(ROWS, TOKENS, config.cross_attention_dim),
    }
    used = {name: axes[name] for name in example}
    if not (folder / PLAIN).exists():
        torch.manual_seed(0)
        module = Unet(config).eval().requires_grad_(False)
        export_graph(module, example, ("output",), used, folder)
    return {PLAIN: plain_component(folder), **write_hoisted_graphs(folder, "float32")}


def counted(raw: dict[str, Any], size: str) -> dict[str, float]:
    """Of a guided evaluation, the fractions of operations and weights that leave the loop."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    config = UnetConfig.from_json(raw)
    width, height = (int(side) // 8 for side in size.split("x"))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module = Unet(config)
        inputs = {
            "sample": torch.zeros(ROWS, config.in_channels, height, width),
            "timestep": torch.zeros(ROWS),
            "context": torch.zeros(ROWS, TOKENS, config.cross_attention_dim),
        }
        if config.pooled_width:
            inputs["pooled"] = torch.zeros(ROWS, config.pooled_width)
            inputs["time_ids"] = torch.zeros(ROWS, 6)
        module(**inputs)
    keys_values = time_layers = total = 0
    for name, weight in module.named_parameters():
        total += weight.numel()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            keys_values += weight.numel()
        elif "time_emb" in name or "add_emb" in name:
            time_layers += weight.numel()
    moved = 2 * ROWS * (TOKENS * keys_values + time_layers)
    return {
        "operations": moved / counter.get_total_flops(),
        "weights": (keys_values + time_layers) / total,
    }


def timed_layers(size: str, rounds: int) -> dict[str, Any]:
    """Processor seconds of guided evaluations of the full-size UNet in eager torch, and of the
    layers in them that could leave the loop. Weights are constant: no time depends on them.
    """
    import torch

    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    with torch.device("meta"):
        module: Any = Unet(UnetConfig.from_json(unet_config()))
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    for weight in module.parameters():
        weight.fill_(0.003)
    began, spent = 0.0, 0.0

    def start(*_: object) -> None:
        nonlocal began
        began = time.process_time()

    def stop(*_: object) -> None:
        nonlocal spent
        spent += time.process_time() - began

    for name, layer in module.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "time_emb_proj", "time_embedding")):
            layer.register_forward_pre_hook(start)
            layer.register_forward_hook(stop)
    width, height = (int(side) // 8 for side in size.split("x"))
    inputs = {
        "sample": torch.randn(ROWS, 4, height, width),
        "timestep": torch.full((ROWS,), 500.0),
        "context": torch.randn(ROWS, TOKENS, 768),
    }
    evaluations, layers = [], []
    for _ in range(rounds + 1):
        spent, before = 0.0, time.process_time()
        module(**inputs)
        evaluations.append(time.process_time() - before)
        layers.append(spent)
    return {"evaluations": evaluations[1:], "layers": layers[1:]}  # the first sets things up


def plain_component(folder: Path) -> Component:
    import onnx_ir as ir

    from sdrt.export.graph import graph_specs

    graph = ir.load(folder / PLAIN).graph
    return Component(graph_specs(graph.inputs), graph_specs(graph.outputs), "float32", {})


def loaded(backend: str, folder: Path, graphs: Graphs, file: str) -> Engine:
    """One of the graphs on a backend, as a bundle's UNet is loaded."""
    manifest = Manifest(
        name="hoisting",
        source="random weights",
        sizes=((256, 256),),
        batch=(1, 1, 1),
        latent_channels=4,
        downscale=8,
        max_tokens=TOKENS,
        opset=23,
        components={"unet": graphs[file]},
        parity={},
        preview=(),
        files=describe_files(folder),
    )
    load = select_backend(backend).load
    assert load is not None
    return load(Bundle(folder, manifest, file), "unet")


def pick(engine: Engine, feeds: Feeds) -> Feeds:
    return {spec.name: feeds[spec.name] for spec in engine.inputs}


def timed(engine: Engine, feeds: Feeds) -> tuple[float, float]:
    """Seconds and processor seconds of a call."""
    began, before = time.perf_counter(), time.process_time()
    engine(feeds)
    return time.perf_counter() - began, time.process_time() - before


def compared(
    engines: Mapping[str, Engine], own: Mapping[str, Engine], size: str, rounds: int
) -> dict[str, Any]:
    """Both graphs in turns, and what the others take once an image and once a run."""
    width, height = (int(side) // 8 for side in size.split("x"))
    rng = np.random.default_rng(0)
    inputs = {spec.name: spec.shape for spec in engines["plain"].inputs}
    context = rng.normal(size=(ROWS, TOKENS, int(inputs["context"][2])))
    feeds: dict[str, np.ndarray] = {
        "sample": rng.normal(size=(ROWS, 4, height, width)).astype(np.float32),
        "timestep": np.full(ROWS, 500.0, np.float32),
        "context": context.astype(np.float32),
    }
    for engine in own.values():
        feeds |= engine(pick(engine, feeds))
    outputs = {name: engine(pick(engine, feeds))["output"] for name, engine in engines.items()}
    difference = np.abs(outputs["plain"] - outputs["hoisted"]).max()
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in (*engines, *own)}
    for turn in range(rounds):
        order = list(engines) if turn % 2 else list(engines)[::-1]
        for name in (*order, *own):
            engine = {**engines, **own}[name]
            turns[name].append(timed(engine, pick(engine, feeds)))
    seconds, processor = (
        {name: [both[i] for both in values] for name, values in turns.items()} for i in range(2)
    )
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "ratio": paired(seconds),
        "processor_ratio": paired(processor),
        "relative_difference": float(difference / np.abs(outputs["plain"]).max()),
    }


def paired(turns: Turns) -> float:
    """How many times what the hoisted graph takes the plain one does, the median of the turns."""
    pairs = zip(turns["plain"], turns["hoisted"], strict=True)
    return statistics.median(plain / hoisted for plain, hoisted in pairs)


def said_of(figures: dict[str, Any]) -> str:
    processor = {n: statistics.median(of) for n, of in figures["processor_seconds"].items()}
    difference = figures["relative_difference"]
    equal = "same bytes" if difference == 0.0 else f"largest difference {difference:.0e}"
    return (
        f"{figures['processor_ratio']:.3f} × ({processor['plain']:.3f} to "
        f"{processor['hoisted']:.3f} s of processor time); {equal}; once an image "
        f"{1e3 * processor['context']:.1f} ms, once a step's timestep "
        f"{1e3 * processor['time']:.1f} ms"
    )


def save_layers(args: argparse.Namespace) -> None:
    claims, figures = {}, {}
    for size in args.sizes.split(","):
        name = f"full-size layers that could leave the loop, {size}, guided, torch fp32"
        figures[name] = measured = timed_layers(size, args.rounds)
        pairs = zip(measured["layers"], measured["evaluations"], strict=True)
        fraction = statistics.median(layers / evaluation for layers, evaluation in pairs)
        claims[name] = f"{fraction:.1%} of the evaluation's processor time"
    print(json.dumps(claims, indent=2))
    if args.save:
        save("hoisting_layers", claims, figures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--divisor", default="4", help="of all widths, separated by commas")
    parser.add_argument("--sizes", default="256x256,512x512")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engines", default="onnxruntime,openvino,torch")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--layers", action="store_true", help="only those layers, at full size")
    args = parser.parse_args()
    if args.layers:
        save_layers(args)
        return
    claims: dict[str, str] = {}
    figures: dict[str, Any] = {}
    for model, (raw, sizes) in COUNTED.items():
        for size in sizes:
            name = f"leaves the loop of {model}, {size}, guided"
            figures[name] = fractions = counted(raw, size)
            claims[name] = (
                f"{fractions['operations']:.2%} of the operations, {fractions['weights']:.1%} of "
                "the weights"
            )
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        os.environ["SDRT_HOME"] = str(work / "home")  # compiled graphs are not for other runs
        for divisor in (int(text) for text in args.divisor.split(",")):
            folder = work / f"hoisting-{divisor}"
            graphs = exported(folder / "unet", divisor)
            for backend in args.engines.split(","):
                engines, own = (
                    {n: loaded(backend, folder, graphs, file) for n, file in names.items()}
                    for names in (
                        {"plain": PLAIN, "hoisted": HOISTED_GRAPH},
                        {"context": CONTEXT_GRAPH, "time": TIME_GRAPH},
                    )
                )
                for size in args.sizes.split(","):
                    width = "full width" if divisor == 1 else f"1/{divisor} of the width"
                    name = f"guided evaluation, hoisted, {width}, {size}, {backend}"
                    figures[name] = compared(engines, own, size, args.rounds)
                    claims[name] = said_of(figures[name])
                    print(name, claims[name], flush=True)
                for engine in (*engines.values(), *own.values()):
                    engine.close()
    print(json.dumps(claims, indent=2, ensure_ascii=False))
    if args.save:
        save("hoisting" if args.divisor == "1" else "hoisting_narrow", claims, figures)


if __name__ == "__main__":
    main()
