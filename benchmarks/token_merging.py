"""What does token merging save, and how far are its images from the full run's, next to feature
reuse?

    python benchmarks/token_merging.py --work FOLDER [--divisor 1] [--size 512x512] [--rounds 7]
        [--precision auto] [--captions 40] [--save]

Stable Diffusion 1.5 with random weights, its widths over the divisor, made and built in FOLDER
unless `fewer.py` has done so (at full size 14 GB; kept): guided evaluations on OpenVINO with tokens
merged at the highest resolution, as the paper does by default, in turns with plain and shallow
ones, and an image of 20 steps each way. Random weights say how far an image is from the same run in
full, not how good it is. Then the embedded model on ONNX Runtime, with images of many captions and
seconds of an image. A way is on the front of time over distance unless another one is both faster
and nearer.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fewer import PROMPT, SAMPLER, STEPS, WAYS, distance, paired
from merged_graph import write_merged_graph
from published import made_bundle, unet_config
from results import save

import sdrt
from sdrt.bundle import Bundle, open_bundle, parse_size
from sdrt.bundle.embedded import materialize
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import FEATURE, SHALLOW
from sdrt.engine import Engine, select_backend
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.deepcache import with_feature_reuse
from sdrt.runtime.output_reuse import with_output_reuse
from sdrt.runtime.pipeline import Pipeline
from sdrt.runtime.samplers.table import sampler_table

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from shapes_reader import verdict
from shapes_scenes import caption, scene_from_random

ROWS, TOKENS = 2, 77
FULL = "full"
RATIOS = {f"merging {100 * ratio:.0f} %": ratio for ratio in (0.25, 0.5)}
REUSES = ("reuse 2", "reuse 3", "reuse 5, extrapolated", "preset balanced", "preset fast")
COMPARED = (FULL, *RATIOS, *REUSES, f"preset balanced, {list(RATIOS)[-1]}")
COUNTED = ("512x512", "768x768", "1024x1024")
Turns = dict[str, list[float]]


def merged_engines(bundle: Bundle, backend: str, folder: Path) -> dict[str, Engine]:
    """By way, the bundle's UNet with merged tokens, over links to its weights in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle.folder / "unet", folder / "unet", copy_function=os.link)
    dtype = bundle.manifest.components["unet"].dtype
    graphs = {name: f"merged_{100 * ratio:.0f}.onnx" for name, ratio in RATIOS.items()}
    components = {
        name: write_merged_graph(folder / "unet", file, RATIOS[name], dtype)
        for name, file in graphs.items()
    }
    files, load = describe_files(folder), select_backend(backend).load
    assert load is not None
    return {
        name: load(
            Bundle(
                folder,
                replace(bundle.manifest, components={"unet": component}, files=files),
                graphs[name],
            ),
            "unet",
        )
        for name, component in components.items()
    }


def saved_operations(size: str) -> dict[str, float]:
    """By way, the fraction of a full-width guided evaluation's operations that merging saves, less
    those of the products by which it matches and averages.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    config = UnetConfig.from_json(unet_config())
    width, height = (side // 8 for side in parse_size(size))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Unet(config)(
            sample=torch.zeros(ROWS, config.in_channels, height, width),
            timestep=torch.zeros(ROWS),
            context=torch.zeros(ROWS, TOKENS, config.cross_attention_dim),
        )
    tokens, channels = width * height, config.block_out_channels[0]
    layers = 2 * config.layers_per_block + 1  # on the way down and on the way up

    def attention(count: int) -> int:
        return 4 * count * channels**2 + 2 * count**2 * channels

    def saved(merged: int) -> int:
        matching = tokens // 4 * channels * (tokens - tokens // 4 + merged)
        return attention(tokens) - attention(tokens - merged) - matching

    products = {way: saved(int(tokens * ratio)) for way, ratio in RATIOS.items()}
    return {way: 2 * ROWS * layers * of / counter.get_total_flops() for way, of in products.items()}


def parse_way(way: str) -> tuple[str, str]:
    """Of which UNet its full evaluations are, and its reuse or nothing."""
    reuse, _, unet = way.rpartition(", ")
    if unet in RATIOS:
        return unet, reuse
    return FULL, way if way in REUSES else ""


def timed_evaluations(engines: Mapping[str, Engine], size: str, rounds: int) -> Turns:
    """Seconds of guided evaluations in turns, by way; with reuse the mean of an evaluation."""
    width, height = (side // 8 for side in parse_size(size))
    rng = np.random.default_rng(0)
    context = next(spec for spec in engines[FULL].inputs if spec.name == "context")
    feeds: dict[str, np.ndarray] = {
        "sample": rng.normal(size=(ROWS, 4, height, width)).astype(np.float32),
        "timestep": np.full(ROWS, 500.0, np.float32),
        "context": rng.normal(size=(ROWS, TOKENS, int(context.shape[2]))).astype(np.float32),
    }
    feeds[FEATURE] = engines[FULL](feeds_of(engines[FULL], feeds))[FEATURE]
    turns: Turns = {name: [] for name in engines}
    for turn in range(rounds + 1):  # the first sets things up
        for name in list(engines) if turn % 2 else list(engines)[::-1]:
            inputs = feeds_of(engines[name], feeds)
            began = time.perf_counter()
            engines[name](inputs)
            turns[name] += [time.perf_counter() - began] if turn else []
    seconds: Turns = {}
    for way in COMPARED:
        unet, reuse = parse_way(way)
        full, shallow = count_evaluations(reuse)
        pairs = zip(turns[unet], turns[SHALLOW], strict=True)
        seconds[way] = [(full * slow + shallow * quick) / STEPS for slow, quick in pairs]
    return seconds


def count_evaluations(reuse: str) -> tuple[int, int]:
    """How many of an image's evaluations run the full UNet, and how many its shallow part."""
    options = parse_options(WAYS[reuse] if reuse else {})
    table = sampler_table({"_class_name": "DPMSolverMultistepScheduler"}, STEPS)
    if options.output_reuse > 1:
        table, _ = with_output_reuse(table, options.output_reuse)
        return table.evaluations, 0
    every, order = options.feature_reuse, options.feature_reuse_order
    reused = with_feature_reuse(table, every, [ROWS] * STEPS, order=order)
    assert reused.full_evaluations is not None
    full = int(reused.full_evaluations.sum())
    return full, STEPS - full


def feeds_of(engine: Engine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {spec.name: feeds[spec.name] for spec in engine.inputs}


def draw(
    pipe: Pipeline, unets: Mapping[str, Engine], way: str, prompts: Sequence[str], size: str
) -> list[np.ndarray]:
    """A pipeline's images with one of the UNets."""
    unet, reuse = parse_way(way)
    pipe.engines["unet"] = unets[unet]
    options = WAYS[reuse] if reuse else {}
    out = pipe(list(prompts), num_inference_steps=STEPS, seed=0, size=size, **options)
    return [np.asarray(image) for image in out.images]


def of_published(args: argparse.Namespace) -> dict[str, Any]:
    """Stable Diffusion 1.5: seconds of evaluations, and the distance of an image."""
    made_bundle(args.work, [args.size], "--feature-reuse", divisor=args.divisor)
    bundle = open_bundle(args.work / "bundle")
    if SHALLOW not in bundle.manifest.components:
        sys.exit(f"{bundle.folder} was built without feature reuse: name another folder")
    loaded = sdrt.load(bundle.folder, backend="openvino", precision=args.precision)
    if args.precision == "exact":
        bundle = replace(bundle, manifest=replace(bundle.manifest, admitted={}))
    with loaded.with_scheduler(SAMPLER) as pipe:
        merged = merged_engines(bundle, "openvino", args.work / "merged")
        unets = {FULL: pipe.engines["unet"], **merged}
        seconds = timed_evaluations(
            {**unets, SHALLOW: pipe.engines[SHALLOW]}, args.size, args.rounds
        )
        images = {way: draw(pipe, unets, way, [PROMPT], args.size) for way in COMPARED}
        precision = pipe.compute_precision
        close(pipe, unets)
    return {"precision": precision, "ways": compared(images, seconds)}


def of_embedded(folder: Path, count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """`shapes`: seconds of an image, distances of many, and what a reader makes of them."""
    rng = np.random.default_rng(2026)
    scenes = [scene_from_random(rng) for _ in range(count)]
    captions = [caption(scene) for scene in scenes]
    bundle = open_bundle(materialize("shapes", folder / "home"))
    seconds: Turns = {way: [] for way in COMPARED}
    with sdrt.load(bundle.folder, backend="onnxruntime").with_scheduler(SAMPLER) as pipe:
        merged = merged_engines(bundle, "onnxruntime", folder / "merged-shapes")
        unets = {FULL: pipe.engines["unet"], **merged}
        for turn in range(rounds + 1):  # the first sets things up
            for way in COMPARED:
                began = time.perf_counter()
                draw(pipe, unets, way, [PROMPT], "64x64")
                seconds[way] += [time.perf_counter() - began] if turn else []
        images = {way: draw(pipe, unets, way, captions, "64x64") for way in COMPARED}
        close(pipe, unets)
    figures = compared(images, seconds)
    for way, own in images.items():
        read = [verdict(image, scene) for image, scene in zip(own, scenes, strict=True)]
        figures[way]["shape"] = float(np.mean([item.shape for item in read]))
    return figures


def close(pipe: Pipeline, unets: Mapping[str, Engine]) -> None:
    """Close the UNets but the pipeline's own, which it has again."""
    pipe.engines["unet"] = unets[FULL]
    for name in RATIOS:
        unets[name].close()


def compared(images: Mapping[str, list[np.ndarray]], seconds: Turns) -> dict[str, dict[str, Any]]:
    return {
        way: {
            **distance(images[way], images[FULL]),
            "seconds": seconds[way],
            "times_faster": paired(seconds[FULL], seconds[way]),
        }
        for way in COMPARED
    }


def off_the_front(figures: Mapping[str, Mapping[str, Any]], way: str) -> str:
    """Which ways are both faster and nearer to the full run; none are for one on the front."""
    own = figures[way]
    better = [
        name
        for name, of in figures.items()
        if of["times_faster"] > own["times_faster"] and of["psnr"] > own["psnr"]
    ]
    return f"slower and further than {', '.join(better)}" if better else "on the front"


def claims_of(
    subject: str, figures: Mapping[str, Mapping[str, Any]], own: Mapping[str, str]
) -> dict[str, str]:
    return {
        f"{subject}, {way}": (
            f"{of['times_faster']:.2f} × as fast; {of['psnr']:.1f} dB, SSIM {of['ssim']:.3f} "
            f"against the full run{own.get(way, '')}; {off_the_front(figures, way)}"
        )
        for way, of in figures.items()
        if way != FULL
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--divisor", type=int, default=1, help="of all widths")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto", choices=("auto", "exact"))
    parser.add_argument("--captions", type=int, default=40, help="of the embedded model")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    os.environ["SDRT_HOME"] = str(args.work.resolve() / "home")  # not for other runs
    claims: dict[str, str] = {}
    counted = {size: saved_operations(size) for size in COUNTED}
    for size, saved in counted.items():
        claims |= {
            f"SD 1.5, {size}, guided, {way}": f"{of:.1%} fewer operations"
            for way, of in saved.items()
        }
    published = of_published(args)
    embedded = of_embedded(args.work, args.captions, 3 * args.rounds)
    width = "" if args.divisor == 1 else f", 1/{args.divisor} of the width"
    subject = f"SD 1.5{width}, {args.size}, guided, OpenVINO {published['precision']}"
    seconds = {
        way: f"; {statistics.median(of['seconds']):.2f} s an evaluation"
        for way, of in published["ways"].items()
    }
    claims |= {f"{subject}, {FULL}": seconds[FULL].removeprefix("; ")}
    claims |= claims_of(subject, published["ways"], seconds)
    shapes = f"`shapes`, {args.captions} captions, {STEPS} steps"
    right = {way: f"; shape right {of['shape']:.1%}" for way, of in embedded.items()}
    claims |= claims_of(shapes, embedded, right)
    figures = {"published": published, "shapes": embedded, "operations": counted}
    print(json.dumps(claims, indent=2, ensure_ascii=False))
    if args.save:
        save(f"token_merging{'' if args.divisor == 1 else '_narrow'}", claims, figures)


if __name__ == "__main__":
    main()
