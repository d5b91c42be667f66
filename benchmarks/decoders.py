"""From latents to a PNG: what the decoder takes whole, in tiles and tiny, and what the file takes.

    python benchmarks/decoders.py --bundle NAME|FOLDER [--backend openvino] [--side 512]
        [--tile 256] [--rounds 5] [--save]

Each decoder lives in a process of its own, alone, on smooth random latents; they take turns. The
tiny one is TAESD's network with random weights: its speed, not its images. Seams are what tiles
add to the steps between neighbouring pixels. The PNG is of noise with a photograph's spectrum.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from results import save

from sdrt.bundle import Bundle, open_bundle
from sdrt.engine import select_backend
from sdrt.process_stats import forget_peak, peak_bytes, resident_bytes
from sdrt.runtime import randn
from sdrt.runtime.vae import Tiling, decode_latents, tile_spans

COMPRESSION = (1, 3, 4, 6, 9)  # of PNG's compression


def with_tiny(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle with TAESD's decoder, of random weights, in place of its own."""
    import torch

    from sdrt.bundle.manifest import Component
    from sdrt.export.graph import export_graph
    from sdrt.export.recipes import LATENT_AXES
    from sdrt.export.tiny_vae import AutoencoderTiny, TinyVaeConfig, TinyVaeDecoder

    torch.manual_seed(0)
    module = TinyVaeDecoder(AutoencoderTiny(TinyVaeConfig())).eval().requires_grad_(False)
    example = {"latents": torch.zeros(2, 4, 16, 16)}
    axes = {"latents": LATENT_AXES}
    specs = export_graph(module, example, ("image",), axes, folder / "vae_decoder")
    components = {"vae_decoder": Component(*specs, "float32", {})}
    return Bundle(folder, replace(bundle.manifest, components=components))


def work(args: argparse.Namespace) -> None:
    """A worker: says what it holds, then decodes at every line and prints the seconds."""
    bundle = open_bundle(args.bundle)
    scale, channels = bundle.manifest.downscale, bundle.manifest.latent_channels
    candidate = select_backend(args.backend, bundle.bytes)
    assert candidate.load is not None
    tile = args.tile if args.worker == "tiled" else args.side
    with tempfile.TemporaryDirectory() as folder:
        if args.worker == "tiny":
            bundle = with_tiny(bundle, Path(folder))
        engine = candidate.load(bundle, "vae_decoder")
        side = args.side // scale
        coarse = randn(0, (1, channels, side // 4, side // 4))
        latents = coarse.repeat(4, axis=2).repeat(4, axis=3)
        tiling = Tiling([(tile // scale, tile // scale)], scale)
        decode = partial(decode_latents, {"vae_decoder": engine}, tiling, latents)
        before = resident_bytes()
        forget_peak()  # that of loading
        np.save(args.image, decode())
        print(before / 1e9, peak_bytes() / 1e9, flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            decode()
            print(time.perf_counter() - began, flush=True)


def measured(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, object]]:
    """Seconds and memory beyond the weights of every decoder, in turns."""
    workers, actual = {}, {}
    for name in ("whole", "tiled", "tiny"):
        command = [sys.executable, *sys.argv, "--worker", name]
        command += ["--image", str(folder / f"{name}.npy")]
        workers[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        before, peak = (float(part) for part in workers[name].stdout.readline().split())
        actual[name] = {"before_gb": before, "peak_gb": peak, "seconds": []}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            actual[name]["seconds"].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return actual


def seams(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """What tiles add at their borders and elsewhere, and the PSNR of the whole image in dB."""
    scale = open_bundle(args.bundle).manifest.downscale
    full, tiled = (np.clip(np.load(folder / f"{n}.npy"), -1, 1) for n in ("whole", "tiled"))
    error = max(float(np.mean((full - tiled) ** 2)) / 4.0, 1e-12)
    added = np.abs(np.diff(tiled, axis=3) - np.diff(full, axis=3)).mean(axis=(0, 1, 2))
    spans = tile_spans(args.side // scale, args.tile // scale)
    borders = {scale * s for span in spans for s in (span.start, span.stop)} - {0, args.side}
    at = [border - 1 for border in borders]
    return {
        "psnr": -10 * float(np.log10(error)),
        "at_borders": float(added[at].max()),
        "elsewhere": float(np.delete(added, at).max()),
    }


def files(side: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds and bytes of a PNG by level of compression."""
    rng = np.random.default_rng(0)
    up, across = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    spectrum = np.fft.fft2(rng.normal(size=(3, side, side))) / np.maximum(
        np.hypot(up, across), 1 / side
    )
    noise = np.fft.ifft2(spectrum).real
    pixels = np.clip(127.5 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    actual: dict[str, dict[str, float]] = {}
    for level in COMPRESSION:
        times = []
        for _ in range(rounds):
            buffer, began = BytesIO(), time.perf_counter()
            image.save(buffer, "PNG", compress_level=level)
            times.append(1e3 * (time.perf_counter() - began))
        actual[str(level)] = {"ms": statistics.median(times), "bytes": len(buffer.getvalue())}
    return actual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        actual = measured(args, Path(temporary))
        border = seams(args, Path(temporary))
    kinds = files(args.side, args.rounds)
    claims = {}
    full = actual["whole"]["seconds"]
    for name, item in actual.items():
        pairs = zip(full, item["seconds"], strict=True)
        faster = statistics.median(base / own for base, own in pairs)
        kind = {"tiled": f"in tiles of {args.tile}", "tiny": "by a tiny decoder"}.get(name, name)
        claims[f"full-size decode of {args.side}x{args.side} on {args.backend}, {kind}"] = (
            f"{statistics.median(item['seconds']):.2f} s, {faster:.2f} × the untiled speed, "
            f"{item['peak_gb'] - item['before_gb']:.1f} GB beyond the weights"
        )
    said = (f"{level}: {k['ms']:.0f} ms, {k['bytes'] / 1e3:.0f} kB" for level, k in kinds.items())
    claims[f"a PNG of {args.side}x{args.side} by level of compression"] = "; ".join(said)
    for name, text in claims.items():
        print(f"{name}: {text}")
    print("seams:", border)
    if args.save:
        save(f"decoders_{args.side}", claims, {"decoders": actual, "seams": border, "png": kinds})


if __name__ == "__main__":
    main()
