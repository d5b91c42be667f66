"""Time and peak memory of exporting what conditions a model, at its published size.

    python benchmarks/build_full_control.py [--components controlnet,rrdb] [--save]

Random float32 weights of the published configurations go through the exporter of `sdrt build`, one
network after the other. Every graph is checked by onnx, loaded in ONNX Runtime and compared with
torch. Each step is a process of its own, so that its peak is its own. 3 GB of disk, minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_full_sdxl import CLOSE, check, load
from published import XL_UNET, unet_config
from results import save

from sdrt.process_stats import peak_bytes

# 5 times smaller than the full one (271 of 1,251 million weights): one block attends, once.
XL_MID = {
    **XL_UNET,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": 1,
}
VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
RRDB = {"channels": 64, "growth": 32, "num_blocks": 23, "num_doublings": 2}
# Of each cross-attention layer of Stable Diffusion 1.5: way down, way up, middle.
ATTENTIONS = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280)
CONTEXT = 768
VIT_H_STATES = 257


@dataclass(frozen=True, slots=True)
class Export:
    """What `export_graph` is called with."""

    module: Any
    feeds: dict[str, Any]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]


def controlnet(config: Mapping[str, Any], context: int) -> Export:
    import torch

    from sdrt.export.control_build import control_recipe
    from sdrt.export.control_checkpoint import ControlCheckpoint
    from sdrt.export.controlnet import ControlNet, ControlNetConfig

    unread = ("sample_size", "_class_name")
    parsed = ControlNetConfig.from_json({k: v for k, v in config.items() if k not in unread})
    recipe = control_recipe(ControlCheckpoint("net", "", Path(), "controlnet", parsed))
    feeds = {
        "sample": torch.randn(2, 4, 16, 24),
        "timestep": torch.tensor([3.0, 700.0]),
        "context": torch.randn(2, 77, context),
    }
    if parsed.unet.pooled_width:
        feeds["pooled"] = torch.randn(2, parsed.unet.pooled_width)
        feeds["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
    feeds["control_image"] = torch.rand(2, 3, 128, 192)
    with torch.device("meta"):
        module = ControlNet(parsed)
    axes = {name: recipe.axes[name] for name in feeds}
    return Export(module, feeds, recipe.outputs, axes)


def image_encoder() -> Export:
    import torch
    import transformers

    from sdrt.export.ip_adapter import ImageEncoder

    config: Any = transformers.CLIPVisionConfig(**VIT_H)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = transformers.CLIPVisionModelWithProjection(config)
    module = ImageEncoder(model, hidden_states=False)
    return one_input(module, "pixels", torch.randn(2, 3, 224, 224), "image")


def ip_adapter(projection: str) -> Export:
    import torch

    from sdrt.export.ip_adapter import ImageProjection, IpAdapter, IpAdapterConfig, Resampler

    with torch.device("meta"):
        if projection == "base":
            image, network = torch.randn(2, 1024, device="cpu"), ImageProjection(1024, CONTEXT)
            config = IpAdapterConfig(projection, 1024, CONTEXT, ATTENTIONS, 4)
        else:
            image = torch.randn(2, VIT_H_STATES, 1280, device="cpu")
            sizes = {"channels": 768, "inner": 768, "queries": 16, "depth": 4}
            network = Resampler(1280, CONTEXT, **sizes)
            config = IpAdapterConfig(projection, 1280, CONTEXT, ATTENTIONS, 16)
        module = IpAdapter(config, network)
    return one_input(module, "image", image, "ip_adapter_kv")


def rrdb() -> Export:
    import torch

    from sdrt.export.esrgan import RrdbConfig, RrdbNet
    from sdrt.export.upscaler_build import AXES

    with torch.device("meta"):
        module = RrdbNet(RrdbConfig(**RRDB))
    return Export(module, {"image": torch.rand(2, 3, 48, 64)}, ("enlarged",), AXES)


def one_input(module: Any, name: str, example: Any, output: str) -> Export:
    return Export(module, {name: example}, (output,), {name: {0: "rows"}})


COMPONENTS: dict[str, tuple[str, Callable[[], Export]]] = {
    "controlnet": (
        "ControlNet of Stable Diffusion 1.5",
        lambda: controlnet(unet_config(), CONTEXT),
    ),
    "controlnet_xl_mid": ("ControlNet of SDXL, mid", lambda: controlnet(XL_MID, 2048)),
    "image_encoder": ("IP-Adapter's image encoder, ViT-H/14", image_encoder),
    "ip_adapter": ("IP-Adapter of Stable Diffusion 1.5", lambda: ip_adapter("base")),
    "ip_adapter_plus": ("IP-Adapter Plus of Stable Diffusion 1.5", lambda: ip_adapter("plus")),
    "rrdb": ("ESRGAN x4, RRDBNet of 23 blocks", rrdb),
}


def randomize(module: Any) -> Any:
    """The module of the meta device with weights that keep activations tame."""
    import torch

    torch.manual_seed(0)
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.5 * weight[0].numel() ** -0.5)
        else:
            weight.fill_(float("norm" in name and name.endswith("weight")))
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[1])[None])
    return module


def export(component: str, folder: Path) -> dict[str, Any]:
    """Export one network; torch's outputs are stored next to it."""
    import numpy as np
    import torch

    from sdrt.export.graph import export_graph

    case = COMPONENTS[component][1]()
    module = randomize(case.module)
    with torch.no_grad():
        actual = module(**case.feeds)
    results = actual if isinstance(actual, tuple) else (actual,)
    began = time.perf_counter()
    export_graph(module, case.feeds, case.outputs, case.axes, folder)
    seconds = time.perf_counter() - began
    arrays = {name: value.numpy() for name, value in case.feeds.items()}
    arrays |= {f"output.{n}": a.numpy() for n, a in zip(case.outputs, results, strict=True)}
    np.savez(folder / "case.npz", **arrays)
    return {"weights": sum(weight.numel() for weight in module.parameters()), "seconds": seconds}


STEPS = {"export": export, "check": check, "load": load}


def run_step(step: str, component: str, folder: Path) -> dict[str, Any]:
    """A step in a process of its own: its figures, its seconds and its peak memory."""
    command = [sys.executable, __file__, "--step", step, component, str(folder)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "process_seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--components", default=",".join(COMPONENTS))
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, component, folder = args.step
        figures = STEPS[step](component, Path(folder))
        processor = time.process_time()
        figures |= {"processor_seconds": processor, "peak_kb": peak_bytes() // 1024}
        print(json.dumps(figures))
        return
    figures, claims = {}, {}
    for component in args.components.split(","):
        with tempfile.TemporaryDirectory() as work:
            actual = {step: run_step(step, component, Path(work)) for step in STEPS}
        figures[component] = actual
        exported, checked, loaded = actual["export"], actual["check"], actual["load"]
        assert loaded["cosine"] >= CLOSE, f"{component}: cosine {loaded['cosine']}"
        claims[f"exporting {COMPONENTS[component][0]}"] = (
            f"{exported['peak_kb'] / 1e6:.1f} GB, {exported['seconds']:.0f} s "
            f"({exported['processor_seconds']:.0f} s of processor time); "
            f"{exported['weights'] / 1e6:,.0f} M weights, {checked['nodes']:,} nodes; "
            f"loaded: cosine {loaded['cosine']:.6f}"
        )
        print(component, json.dumps(actual), claims, flush=True)
        if args.save:  # after each, as all of them take long
            save("build_full_control", claims, figures)


if __name__ == "__main__":
    main()
