"""What fewer and cheaper evaluations save, and how far their images are from the full run's.

    python benchmarks/fewer.py [--work FOLDER] [--size 256x256] [--rounds 3] [--save]

Without `--work` the embedded model: many captions and seeds, their images against those of the
full run, and what a reader of shapes makes of them. With it full-size Stable Diffusion 1.5 of
random weights, made and built in FOLDER (7 GB; kept there): whole images of 20 steps in turns
with diffusers', in fp32 and bf16. Random weights say nothing of how good an image is,
only how far it is from the same run in full.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from published import made_bundle, reference_pipeline
from results import save
from similarity import psnr, ssim

import sdrt
from sdrt.runtime.presets import PRESETS

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from shapes_reader import verdict
from shapes_scenes import caption, scene_from_random

STEPS = 20
PROMPT = "a red circle on a blue background"
SAMPLER = "DPM++ 2M"
OTHER_SAMPLERS = ("Euler", "UniPC", "Heun", "PNDM")
WAYS: dict[str, dict[str, object]] = {
    "full": {},
    **{f"{steps} steps": {"num_inference_steps": steps} for steps in (11, 8, 5)},
    "guidance in the first 80 %": {"guidance_interval": (0.0, 0.8)},
    "reuse 2": {"feature_reuse": 2},
    "reuse 3": {"feature_reuse": 3},
    **{
        f"reuse {every}, extrapolated": {"feature_reuse": every, "feature_reuse_order": 1}
        for every in (2, 3, 5)
    },
    **{f"output reuse {every}": {"output_reuse": every} for every in (2, 4, 6)},
    **{f"preset {name}": {"preset": name} for name in PRESETS if name != "exact"},
}


def distance(actual: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, float]:
    """PSNR in dB (median, 10th percentile and worst), and the median SSIM."""
    near = [psnr(a, b) for a, b in zip(actual, expected, strict=True)]
    alike = [ssim(a, b) for a, b in zip(actual, expected, strict=True)]
    return {
        "psnr": statistics.median(near),
        "psnr_nine_of_ten": float(np.percentile(near, 10)),
        "psnr_worst": min(near),
        "ssim": statistics.median(alike),
    }


def embedded(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """The embedded model: distance, what a reader makes of its images, seconds each."""
    rng = np.random.default_rng(2026)
    scenes = [scene_from_random(rng) for _ in range(count)]
    captions = [caption(scene) for scene in scenes]
    actual: dict[str, dict[str, float]] = {}
    with sdrt.load("shapes", backend="onnxruntime") as loaded:
        pipe = loaded.with_scheduler(SAMPLER)
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for turn in range(rounds + 1):  # the first sets things up
            for name, options in WAYS.items():
                began = time.perf_counter()
                pipe(PROMPT, seed=0, **{"num_inference_steps": STEPS, **options})
                times[name] += [time.perf_counter() - began] if turn else []
        expected: list[np.ndarray] = []
        for name, options in WAYS.items():
            out = pipe(captions, seed=0, **{"num_inference_steps": STEPS, **options})
            arrays = [np.asarray(image) for image in out.images]
            expected = expected or arrays
            read = [verdict(p, s) for p, s in zip(arrays, scenes, strict=True)]
            right = {
                part: float(np.mean([getattr(item, part) for item in read]))
                for part in ("background", "colour", "shape")
            }
            actual[name] = {
                **distance(arrays, expected),
                **right,
                "seconds": statistics.median(times[name]),
                "times_faster": paired(times["full"], times[name]),
            }
    return actual


def by_sampler(count: int) -> dict[str, dict[str, dict[str, float]]]:
    """By sampler, how far the presets' images of the embedded model are from the full run's."""
    rng = np.random.default_rng(2026)
    captions = [caption(scene_from_random(rng)) for _ in range(count)]
    actual: dict[str, dict[str, dict[str, float]]] = {}
    with sdrt.load("shapes", backend="onnxruntime") as loaded:
        for sampler in OTHER_SAMPLERS:
            pipe = loaded.with_scheduler(sampler)
            images = {
                name: pipe(captions, num_inference_steps=STEPS, seed=0, preset=name).images
                for name in PRESETS
            }
            actual[sampler] = {
                name: distance(*(list(map(np.asarray, of)) for of in (own, images["exact"])))
                for name, own in images.items()
                if name != "exact"
            }
    return actual


def paired(base: list[float], own: list[float]) -> float:
    """How many times faster, the median of the rounds."""
    return statistics.median(a / b for a, b in zip(base, own, strict=True))


def fractions(checkpoint: Path, size: tuple[int, int]) -> dict[str, float]:
    """Floating-point operations of a guided evaluation, attention included, in 1e9: the whole UNet
    and its shallow part from each branch.
    """
    import json

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig

    config = UnetConfig.from_json(json.loads((checkpoint / "unet" / "config.json").read_text()))
    with torch.device("meta"):
        unet = Unet(config)
        sides = size[1] // 8, size[0] // 8
        inputs = {
            "sample": torch.zeros(2, config.in_channels, *sides),
            "timestep": torch.zeros(2),
            "context": torch.zeros(2, 77, config.cross_attention_dim),
        }

    def counted(call, **more) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(**inputs, **more)
        return counter.get_total_flops() / 1e9

    actual = {"whole": counted(unet)}
    for branch in range(config.layers_per_block + 1):
        unet.branch = branch
        with torch.no_grad():
            _, feature = unet(**inputs)
        actual[f"branch {branch}"] = counted(unet.shallow, feature=feature)
    return actual


REFERENCES = {"reference fp32": "float32", "reference bf16": "bfloat16"}
OWN = ("full", "reuse 2", "reuse 5, extrapolated", "preset balanced", "preset fast")
STATIC = ("full", "preset balanced", "preset fast")
ONE_SIZE = ", one size"  # ends the names of ways with `static_size`


def work(name: str, folder: Path, size: tuple[int, int]) -> None:
    """A worker: loads, makes an image for every line, prints the seconds; the image it saves."""
    draw = reference(folder / "model", REFERENCES[name], size) if name in REFERENCES else None
    draw = draw or own(folder / "bundle", size, "static" in name)
    draw("reuse 2", 2)  # sets things up
    print("ready", flush=True)
    for line in sys.stdin:
        way, path = line.strip().split("\t")
        began = time.perf_counter()
        source = draw(way, STEPS)
        print(time.perf_counter() - began, flush=True)
        np.save(path, source)


def own(bundle: Path, size: tuple[int, int], static: bool):
    options = {"static_size": size} if static else {}
    pipe = sdrt.load(bundle, backend="openvino", **options).with_scheduler(SAMPLER)

    def draw(way: str, steps: int) -> np.ndarray:
        pipe.chunk_cache.clear()
        options = {"num_inference_steps": steps, "seed": 0, "size": f"{size[0]}x{size[1]}"}
        return np.asarray(pipe(PROMPT, **{**options, **WAYS[way]}).images[0])

    return draw


def reference(checkpoint: Path, dtype: str, size: tuple[int, int]):
    """diffusers' pipeline, channels last in bf16, as its users run it."""
    import torch
    from diffusers import DPMSolverMultistepScheduler

    pipe = reference_pipeline(checkpoint, dtype)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if dtype == "bfloat16":
        for module in (pipe.unet, pipe.vae):
            module.to(memory_format=torch.channels_last)

    def draw(_: str, steps: int) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(0)
        sides = {"width": size[0], "height": size[1]}
        out = pipe(PROMPT, num_inference_steps=steps, generator=generator, **sides)
        return np.asarray(out.images[0])

    return draw


def full_size(folder: Path, size: str, rounds: int) -> dict[str, dict[str, object]]:
    """Whole images in turns: seconds, how many times faster, and distance from our full run."""
    made_bundle(folder, [size], "--feature-reuse")
    workers = {name: started(name, folder, size) for name in (*REFERENCES, "own", "static")}
    turns = [(name, name, "full") for name in REFERENCES] + [(way, "own", way) for way in OWN]
    turns += [(way + ONE_SIZE, "static", way) for way in STATIC]
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in turns}
    images: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, worker, way in turns:
            path = folder / f"{name}.npy"
            seconds[name].append(asked(workers[worker], f"{way}\t{path}"))
            print(f"{name:36} {seconds[name][-1]:7.2f} s", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    for name in seconds:
        images[name] = np.load(folder / f"{name}.npy")
        (folder / f"{name}.npy").unlink()
    return {
        name: {
            "seconds": taken,
            "times_fp32": paired(seconds["reference fp32"], taken),
            "times_bf16": paired(seconds["reference bf16"], taken),
            **distance([images[name]], [images["full" + ONE_SIZE * name.endswith(ONE_SIZE)]]),
        }
        for name, taken in seconds.items()
    }


def started(name: str, folder: Path, size: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--worker", name, "--work", str(folder), "--size", size]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert worker.stdout is not None and worker.stdout.readline().strip() == "ready", name
    return worker


def asked(worker: "subprocess.Popen[str]", line: str) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(line + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--captions", type=int, default=200, help="of the embedded model")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    width, height = (int(side) for side in args.size.split("x"))
    if args.worker:
        work(args.worker, args.work, (width, height))
        return
    claims = {}
    if args.work:
        ways = full_size(args.work, args.size, args.rounds)
        parts = fractions(args.work / "model", (width, height))
        for name, actual in ways.items():
            print(f"{name:36} " + "  ".join(f"{k} {v}" for k, v in actual.items()))
            if name not in REFERENCES:
                claims[f"full-size image, {args.size}, {STEPS} steps, guidance 7.5, {name}"] = (
                    f"{statistics.median(actual['seconds']):.1f} s, {actual['times_fp32']:.2f} × "
                    f"diffusers fp32, {actual['times_bf16']:.2f} × bf16; "
                    f"{actual['psnr']:.1f} dB, SSIM {actual['ssim']:.3f} against the full run"
                )
        print(parts)
        claims |= {
            f"operations of the shallow UNet, {name}, {args.size}": (
                f"{value / parts['whole']:.1%} of the whole one's {parts['whole']:.0f} GFLOP"
            )
            for name, value in parts.items()
            if name != "whole"
        }
        figures = {"ways": ways, "gflop": parts}
    else:
        samplers = by_sampler(args.captions)
        figures = {"ways": embedded(args.captions, args.rounds), "samplers": samplers}
        for name, actual in figures["ways"].items():
            print(f"{name:36} " + "  ".join(f"{k} {v:.3f}" for k, v in actual.items()))
            if name != "full":
                claims[f"`shapes`, {args.captions} captions, {STEPS} steps, {name}"] = (
                    f"{actual['times_faster']:.2f} × as fast; {actual['psnr']:.1f} dB, nine of ten "
                    f"{actual['psnr_nine_of_ten']:.1f}, SSIM {actual['ssim']:.3f} against the full "
                    f"run; shape right {actual['shape']:.1%}"
                )
        claims |= {
            f"`shapes`, {args.captions} captions, {STEPS} steps, {sampler}": ", ".join(
                f"preset {name} {actual['psnr']:.1f} dB" for name, actual in presets.items()
            )
            for sampler, presets in samplers.items()
        }
    if args.save:
        save(f"fewer_{args.size}" if args.work else "fewer_shapes", claims, figures)


if __name__ == "__main__":
    main()
