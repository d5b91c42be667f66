"""Seconds and peak memory of building the plans of full-size Stable Diffusion 1.5, without a GPU.

    python benchmarks/build_plans.py [--target sm_89] [--size 512x512] [--work FOLDER] [--save]

Makes the fp16 bundle with random weights first, in the folder if one is named, and uses one that is
there. About 5 GB of disk, 6 GB of memory; minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from published import made_bundle
from results import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_89")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = made_bundle(args.work or Path(temporary), [args.size], "--fp16")
        command = [sys.executable, "-m", "sdrt", "build", "--bundle", str(bundle)]
        command += ["--backend", "tensorrt-rtx", "--target", args.target]
        subprocess.run(command, check=True)
        sidecars = [json.loads(path.read_text()) for path in bundle.glob("plans/*/*.json")]
        claims, figures = {}, {}
        for result in sidecars:
            name = result["key"]["component"]
            figures[name] = {key: result[key] for key in ("seconds", "peak_bytes", "size")}
            weights = (bundle / name / "model.safetensors").stat().st_size
            claims[
                f"plan of full-size {name}, fp16, {args.size}, {args.target}, built on the CPU"
            ] = (
                f"{result['seconds']:.0f} s, peak {result['peak_bytes'] / 1e9:.1f} GB, plan "
                f"{result['size'] / 1e6:.0f} MB of {weights / 1e6:.0f} MB weights"
            )
        print(json.dumps(claims, indent=2))
        if args.save:
            save("build_plans", claims, figures)


if __name__ == "__main__":
    main()
