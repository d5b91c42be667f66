"""What a ControlNet costs: a guided evaluation in turns with diffusers', and what its inputs cost.

    python benchmarks/controlnet.py --work FOLDER [--size 512x512] [--divisor 1]
        [--dtypes float32,bfloat16] [--save]

Stable Diffusion 1.5 and a ControlNet for it with random weights, made and built in FOLDER (14 GB at
full size; kept there). Both rows of guidance are under control. The UNet without residual inputs
and the one with them, fed zeros, show what it would cost to have one graph for both.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from published import made_bundle, made_checkpoint, unet_config, write_json
from results import save

import sdrt
from sdrt.bundle import open_bundle, parse_size
from sdrt.bundle.manifest import CONTROL, CONTROL_IMAGE, CONTROLNET
from sdrt.engine import select_backend
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.process_stats import resident_bytes

SCALE = np.float32(0.8)
Feeds = dict[str, np.ndarray]


def write_controlnet(folder: Path, divisor: int, seed: int) -> Path:
    """A ControlNet for the checkpoint of `published`, of random weights, in the hub's layout."""
    import torch
    from safetensors.torch import save_file

    from sdrt.export.controlnet import ControlNet, ControlNetConfig

    torch.manual_seed(seed)
    unread = ("sample_size", "_class_name")
    config = {name: value for name, value in unet_config(divisor).items() if name not in unread}
    write_json(folder / "config.json", {**config, "_class_name": "ControlNetModel"})
    weights = ControlNet(ControlNetConfig.from_json(config)).state_dict()
    half = {name: tensor.half() for name, tensor in weights.items()}
    save_file(half, folder / "diffusion_pytorch_model.safetensors")
    return folder


def made_control_bundles(work: Path, size: str, divisor: int) -> list[Path]:
    """Two control bundles, made once for a folder."""
    bundles = [work / "net_a.bundle", work / "net_b.bundle"]
    for seed, bundle in enumerate(bundles):
        if not (bundle / "sdrt.json").exists():
            net = write_controlnet(work / f"net_{seed}", divisor, seed)
            command = [sys.executable, "-m", "sdrt", "build", "--controlnet", str(net)]
            command += ["--size", size, "--output", str(bundle)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return bundles


@dataclass
class Contestants:
    """Evaluations to time by name, and what loading their engines took in memory and time."""

    calls: dict[str, Callable[[], Any]]
    megabytes: dict[str, float]
    seconds: dict[str, float]
    differences: dict[str, float]


def example_feeds(specs: Any, lengths: Mapping[str, int]) -> Feeds:
    rng = np.random.default_rng(0)
    feeds = {s.name: rng.normal(size=spec_shape(s, lengths)).astype(s.dtype) for s in specs}
    feeds["timestep"] = np.full(lengths["rows"], 500.0, np.float32)
    return feeds


def sdrt_contestants(backend: str, bundle: Path, nets: list[Path], size: str) -> Contestants:
    """The UNet alone, with zeros as residuals, and with those of a net."""
    before = resident_bytes()
    pipe = sdrt.load(bundle, backend=backend)
    lengths = axis_lengths(pipe.manifest, parse_size(size), rows=2)
    unet, control = pipe.engines["unet"], pipe.engines[CONTROL]
    plain = example_feeds(unet.inputs, lengths)
    residuals = {
        spec.name: np.zeros(spec_shape(spec, lengths), spec.dtype)
        for spec in control.inputs
        if spec.name not in plain
    }
    expected = unet(plain)["output"].copy()
    memory = {"without control": (resident_bytes() - before) / 1e6}
    began = time.perf_counter()
    actual = control({**plain, **residuals})["output"]
    seconds = {"first call of the graph with residuals": time.perf_counter() - began}
    memory["with the graph with residuals"] = (resident_bytes() - before) / 1e6
    engines = []
    for path in nets:
        opened = open_bundle(path)
        began = time.perf_counter()
        load = select_backend(backend).load
        assert load is not None
        engines.append(load(opened, CONTROLNET))
        seconds["loading a net"] = time.perf_counter() - began
    width, height = parse_size(size)
    image = np.random.default_rng(1).random((2, 3, height, width), np.float32)
    inputs = {**{name: plain[name] for name in ("sample", "timestep", "context")}}
    inputs[CONTROL_IMAGE] = image

    def controlled(net: Any) -> Any:
        outputs = {name: SCALE * value for name, value in net(inputs).items()}
        return control({**plain, **residuals, **outputs})["output"]

    controlled(engines[1])
    memory["with two nets"] = (resident_bytes() - before) / 1e6
    calls = {
        "without control": lambda: unet(plain),
        "zeros as residuals": lambda: control({**plain, **residuals}),
        "one net": lambda: controlled(engines[0]),
        "another net": lambda: controlled(engines[1]),
    }
    difference = float(np.abs(actual - expected).max() / np.abs(expected).max())
    return Contestants(calls, memory, seconds, {"zeros against none": difference})


def diffusers_contestants(
    checkpoint: Path, net: Path, size: str, dtypes: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """diffusers' UNet with a ControlNet, both rows of guidance in one call."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    width, height = parse_size(size)
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=kind).eval()
        controlnet = ControlNetModel.from_pretrained(net, torch_dtype=kind).eval()
        sample = torch.randn(2, 4, height // 8, width // 8, dtype=kind)
        context = torch.randn(2, 77, 768, dtype=kind)
        image = torch.rand(2, 3, height, width).to(kind)

        def call(
            unet: Any = unet,
            controlnet: Any = controlnet,
            sample: Any = sample,
            context: Any = context,
            image: Any = image,
        ) -> Any:
            with torch.inference_mode():
                down, mid = controlnet(sample, 500, context, image, float(SCALE), return_dict=False)
                return unet(
                    sample,
                    500,
                    context,
                    down_block_additional_residuals=down,
                    mid_block_additional_residual=mid,
                    return_dict=False,
                )

        calls[f"diffusers, {dtype}"] = call
    return calls


def time_in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; the one before them is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def paired(base: list[float], own: list[float]) -> float:
    """How many times faster, the median of the rounds."""
    return statistics.median(a / b for a, b in zip(base, own, strict=True))


def measure(backend: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, ratios, memory and differences on one backend."""
    bundle = made_bundle(work, [args.size], divisor=args.divisor)
    nets = made_control_bundles(work, args.size, args.divisor)
    own = sdrt_contestants(backend, bundle, nets, args.size)
    others = {}
    if not args.alone:
        others = diffusers_contestants(
            made_checkpoint(work, args.divisor),
            work / "net_0",
            args.size,
            args.dtypes.split(","),
        )
    times = time_in_turns({**own.calls, **others}, args.rounds)
    ratios = {
        "zeros as residuals to without control": paired(
            times["zeros as residuals"], times["without control"]
        ),
        "one net to without control": paired(times["one net"], times["without control"]),
        **{f"times faster than {name}": paired(times[name], times["one net"]) for name in others},
    }
    switching = paired_difference(times["another net"], times["one net"])
    print(backend, json.dumps(ratios, indent=1), json.dumps(own.megabytes))
    return {
        "seconds": {name: statistics.median(every) for name, every in times.items()},
        "rounds": times,
        "ratios": ratios,
        "megabytes": own.megabytes,
        "loading_seconds": own.seconds,
        "relative_difference": own.differences,
        "switching_seconds": switching,
    }


def paired_difference(own: list[float], base: list[float]) -> float:
    """Seconds more, the median of the rounds: a net that is called after another one."""
    return statistics.median(a - b for a, b in zip(own, base, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--divisor", type=int, default=1, help="of all widths (default: 1)")
    parser.add_argument("--backends", default="onnxruntime,openvino")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of diffusers")
    parser.add_argument("--alone", action="store_true", help="do not run diffusers")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    figures = {}
    for backend in args.backends.split(","):
        figures[backend] = measure(backend, args.work, args)
        gc.collect()
    if args.save:
        claims = {}
        for backend, of in figures.items():
            faster = [f"{v:.2f} {k}" for k, v in of["ratios"].items() if k.startswith("times")]
            seconds = of["seconds"]["one net"]
            subject = f"a guided evaluation with one ControlNet, {args.size}, {backend}"
            claims[subject] = ", ".join((f"{seconds:.2f} s", *faster))
        width = "" if args.divisor == 1 else f"_divisor{args.divisor}"
        save(f"controlnet_{args.size}{width}", claims, figures)


if __name__ == "__main__":
    main()
