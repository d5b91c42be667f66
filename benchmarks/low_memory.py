"""How much less memory an image takes when components are loaded in turn.

    python benchmarks/low_memory.py [--bundle shapes] [--size WxH] [--steps 2] [--backend B]
        [--save]

The peak of resident memory of a process that loads and makes one image with guidance, with and
without `low_memory`, and whether both make the same bytes.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time

from results import save

import sdrt
from sdrt.bundle import open_bundle
from sdrt.engine.memory_budget import compute_budget
from sdrt.process_stats import peak_bytes


def work(args: argparse.Namespace) -> None:
    """A worker: one image, and what it took."""
    began = time.perf_counter()
    with sdrt.load(args.bundle, backend=args.backend, low_memory=args.worker == "low") as pipe:
        options = {"num_inference_steps": args.steps, "size": args.size, "seed": 0}
        image = pipe("a lighthouse at dusk", **options).images[0]
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    seconds = time.perf_counter() - began
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": seconds, "sha256": digest}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle")
    parser.add_argument("--size")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    actual = {}
    for way in ("usual", "low"):
        command = [sys.executable, *sys.argv, "--worker", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        actual[way] = json.loads(done.stdout)
        print(way, f"{actual[way]['peak_bytes'] / 1e9:.2f} GB, {actual[way]['seconds']:.1f} s")
    same = actual["usual"]["sha256"] == actual["low"]["sha256"]
    manifest = open_bundle(args.bundle).manifest
    needed = [
        compute_budget(manifest, manifest.sizes[0], 2, sequential=turn).total
        for turn in (False, True)
    ]
    print(f"counted {needed[0] / 1e9:.2f} and {needed[1] / 1e9:.2f} GB; same bytes: {same}")
    if args.save:
        size = args.size or "{}x{}".format(*manifest.sizes[0])
        low, usual = (
            f"{actual[way]['peak_bytes'] / 1e9:.2f} GB in {actual[way]['seconds']:.0f} s"
            for way in ("low", "usual")
        )
        what = f"peak memory of a {size} image, {args.backend}, components in turn"
        claims = {what: f"{low}, else {usual}; {'the same' if same else 'other'} bytes"}
        save(f"low_memory_{args.backend}", claims, {**actual, "counted_bytes": needed})


if __name__ == "__main__":
    main()
