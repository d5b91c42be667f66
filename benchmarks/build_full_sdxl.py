"""Time and peak memory of exporting full-size SDXL's UNet and text encoders in fp16, or with
`--components refiner_unet` its refiner's UNet.

    python benchmarks/build_full_sdxl.py [--components unet,text_encoder,text_encoder_2] [--save]

Random weights of the published configurations go through the exporter of `sdrt build`. Every graph
is checked: by onnx's checker, by its inputs, outputs and attention nodes, by the weights that it
points to; then ONNX Runtime loads it, without optimisations that would copy the weights in single
precision, and its answer is compared with torch's. Each step is a process of its own, so that its
peak is its own. 7 GB of disk, minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from published import TEXT, XL_REFINER_UNET, XL_TEXT_2, XL_UNET
from results import save

from sdrt.bundle.manifest import REFINER_TIME_IDS
from sdrt.process_stats import peak_bytes

REFINER_UNET = "refiner_unet"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
CLOSE = 0.999  # least cosine between ONNX Runtime's answer and torch's, in half precision


def load_module(component: str) -> Any:
    """The component with random half-precision weights that keep activations tame."""
    import torch
    import transformers

    from sdrt.export.modules import PairedTextEncoder
    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    torch.manual_seed(0)
    with torch.device("meta"):
        if component == "unet":
            module: Any = Unet(UnetConfig.from_json(XL_UNET))
        elif component == REFINER_UNET:
            config = UnetConfig.from_json(XL_REFINER_UNET)
            module = Unet(replace(config, num_time_ids=REFINER_TIME_IDS))
        else:
            second = component == "text_encoder_2"
            text = transformers.CLIPTextConfig(**(XL_TEXT_2 if second else TEXT))
            text._attn_implementation = "sdpa"
            kind = "CLIPTextModelWithProjection" if second else "CLIPTextModel"
            module = PairedTextEncoder(getattr(transformers, kind)(text))
    module = module.half().to_empty(device="cpu").eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.5 * weight[0].numel() ** -0.5)
        else:
            weight.fill_(float("norm" in name and name.endswith("weight")))
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[1])[None])
    return module


def feeds_of(component: str) -> dict[str, Any]:
    """Two rows of small inputs."""
    import torch

    torch.manual_seed(1)
    if component not in ("unet", REFINER_UNET):
        ids = torch.randint(0, 49406, (2, 77), dtype=torch.int32)
        ids[:, 9:] = 49407
        return {"input_ids": ids}
    is_refiner = component == REFINER_UNET
    after = [6.0] if is_refiner else [1024.0, 1024.0]
    return {
        "sample": torch.randn(2, 4, 16, 24).half(),
        "timestep": torch.tensor([3.0, 700.0]),
        "context": torch.randn(2, 77, 1280 if is_refiner else 2048).half(),
        "pooled": torch.randn(2, 1280).half(),
        "time_ids": torch.tensor([[1024.0, 1024.0, 0.0, 0.0, *after]] * 2),
    }


def export(component: str, folder: Path) -> dict[str, Any]:
    """Export one component; torch's answer is kept next to it."""
    import numpy as np
    import torch

    from sdrt.export.graph import export_graph
    from sdrt.export.recipes import RECIPES

    name = "unet" if component == REFINER_UNET else component
    recipe = next(item for item in RECIPES if item.name == name)
    outputs = recipe.outputs
    module, feeds = load_module(component), feeds_of(component)
    with torch.no_grad():
        answer = module(**feeds)
    answers = answer if isinstance(answer, tuple) else (answer,)
    began = time.perf_counter()
    specs = export_graph(module, feeds, outputs, recipe.axes, folder)
    seconds = time.perf_counter() - began
    arrays = {name: value.numpy() for name, value in feeds.items()}
    arrays |= {f"output.{n}": a.numpy() for n, a in zip(outputs, answers, strict=True)}
    np.savez(folder / "case.npz", **arrays)
    return {
        "weights": sum(weight.numel() for weight in module.parameters()),
        "seconds": seconds,
        "inputs": {spec.name: [spec.dtype, *spec.shape] for spec in specs[0]},
        "outputs": {spec.name: [spec.dtype, *spec.shape] for spec in specs[1]},
    }


def check(component: str, folder: Path) -> dict[str, Any]:
    """Check the graph as it lies on disk, without reading the weights."""
    import onnx

    path = folder / "model.onnx"
    onnx.checker.check_model(str(path))
    graph = onnx.load(path, load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    lengths = [{e.key: e.value for e in tensor.external_data}["length"] for tensor in outside]
    return {
        "nodes": len(graph.node),
        "attentions": sum(node.op_type == "Attention" for node in graph.node),
        "graph_bytes": path.stat().st_size,
        "weight_bytes": sum(int(length) for length in lengths),
    }


def load(component: str, folder: Path) -> dict[str, Any]:
    """Load in ONNX Runtime and compare its answer with torch's."""
    import numpy as np
    import onnxruntime as ort

    from sdrt.engine.parity import measure

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(folder / "model.onnx"), options)
    case = dict(np.load(folder / "case.npz"))
    expected = {name[7:]: case.pop(name) for name in list(case) if name.startswith("output.")}
    actual = session.run(list(expected), case)
    every = [measure(f, w, is_image=False) for f, w in zip(actual, expected.values(), strict=True)]
    return {"cosine": min(item["cosine"] for item in every)}


STEPS = {"export": export, "check": check, "load": load}


def measured(step: str, component: str, folder: Path) -> dict[str, Any]:
    """A step in a process of its own: its figures, its seconds and its peak memory."""
    command = [sys.executable, __file__, "--step", step, component, str(folder)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "whole_seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--components", default=",".join(COMPONENTS))
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, component, folder = args.step
        figures = STEPS[step](component, Path(folder))
        print(json.dumps({**figures, "peak_kb": peak_bytes() // 1024}))
        return
    figures, claims = {}, {}
    with tempfile.TemporaryDirectory() as work:
        for component in args.components.split(","):
            folder = Path(work) / component
            actual = {step: measured(step, component, folder) for step in STEPS}
            figures[component] = actual
            print(json.dumps({component: actual}, indent=2))
            exported, checked, loaded = actual["export"], actual["check"], actual["load"]
            assert loaded["cosine"] >= CLOSE, f"{component}: cosine {loaded['cosine']}"
            claims[f"exporting full-size SDXL's {component} in fp16, graph checked"] = (
                f"{exported['peak_kb'] / 1e6:.1f} GB, {exported['seconds']:.0f} s; "
                f"{exported['weights'] / 1e6:,.0f} M weights, {checked['nodes']:,} nodes; "
                f"loaded: cosine {loaded['cosine']:.6f}"
            )
    for what, said in claims.items():
        print(f"{what}: {said}")
    if args.save:
        is_refiner = args.components == REFINER_UNET
        save(f"build_full_sdxl_{'refiner_' if is_refiner else ''}fp16", claims, figures)


if __name__ == "__main__":
    main()
