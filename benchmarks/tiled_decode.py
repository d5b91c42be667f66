"""What tiles cost and spare: peak memory, time and seams of a large decode, whole and in tiles.

    python benchmarks/tiled_decode.py --bundle NAME|FOLDER [--side 1024] [--tile 512] [--save]

Each runs in a process of its own, with the decoder alone, on smooth random latents.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from results import save

from sdrt.bundle import open_bundle
from sdrt.engine import choose
from sdrt.runtime import randn
from sdrt.runtime.decoding import Tiling, decoded_picture, spans_of


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def decode(args: argparse.Namespace, tile: int, path: Path) -> None:
    """One decode; prints what the process had before it, at most, and the seconds."""
    bundle = open_bundle(args.bundle)
    candidate = choose(args.backend, bundle.bytes)
    assert candidate.load is not None
    engine = candidate.load(bundle, "vae_decoder")
    scale, channels = bundle.manifest.downscale, bundle.manifest.latent_channels
    side = args.side // scale
    coarse = randn(0, (1, channels, side // 4, side // 4))
    latents = coarse.repeat(4, axis=2).repeat(4, axis=3)
    before, began = peak_gigabytes(), time.perf_counter()
    tiling = Tiling([(tile // scale, tile // scale)], scale)
    picture = decoded_picture({"vae_decoder": engine}, tiling, latents)
    print(before, peak_gigabytes(), time.perf_counter() - began)
    np.save(path, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        decode(args, args.child, args.picture)
        return
    figures, pictures = {}, []
    with tempfile.TemporaryDirectory() as work:
        for name, tile in (("whole", args.side), ("tiled", args.tile)):
            path = Path(work) / f"{name}.npy"
            command = [sys.executable, *sys.argv, "--child", str(tile), "--picture", str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            before, peak, seconds = (float(part) for part in done.stdout.split())
            figures[name] = {"before_gb": before, "peak_gb": peak, "seconds": seconds}
            print(f"{name}: {peak - before:.2f} GB beyond the weights, {seconds:.1f} s")
            pictures.append(np.load(path))
    scale = open_bundle(args.bundle).manifest.downscale
    whole, tiled = (np.clip(picture, -1, 1) for picture in pictures)
    error = max(float(np.mean((whole - tiled) ** 2)) / 4.0, 1e-12)
    psnr = -10 * float(np.log10(error))
    added = np.abs(np.diff(tiled, axis=3) - np.diff(whole, axis=3)).mean(axis=(0, 1, 2))
    spans = spans_of(args.side // scale, args.tile // scale)
    borders = {scale * s for span in spans for s in (span.start, span.stop)} - {0, args.side}
    at = [border - 1 for border in borders]
    figures["seams"] = {
        "psnr": psnr,
        "at_borders": float(added[at].max()),
        "elsewhere": float(np.delete(added, at).max()),
    }
    print(figures["seams"])
    if args.save:
        spared = [figures[name]["peak_gb"] - figures[name]["before_gb"] for name in figures][:2]
        claim = f"decoding {args.side}x{args.side} whole and in tiles of {args.tile}"
        said = f"{spared[0]:.1f} GB and {spared[1]:.1f} GB beyond the weights"
        save("tiled_decode", {claim: said}, figures)


if __name__ == "__main__":
    main()
