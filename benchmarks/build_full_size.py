"""Time and peak memory of building full-size Stable Diffusion 1.5 with random weights.

    python benchmarks/build_full_size.py [--fp32] [--size 512x512] [--save]

Weights are made in place from the published configuration; about 2 GB of disk in fp16, 5 GB with
the checkpoint. Takes minutes.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from published import TEXT
from results import save


def write_checkpoint(folder: Path) -> None:
    """Random fp16 weights of the published size, with a scale that keeps activations tame."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    import sdrt
    from sdrt.export.original_config import FAMILIES
    from sdrt.export.unet import Unet, UnetConfig
    from sdrt.export.vae import AutoencoderKL, VaeConfig

    torch.manual_seed(0)
    shapes = Path(sdrt.__file__).parent / "models" / "shapes"
    shutil.copytree(shapes / "tokenizer", folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = json.dumps(FAMILIES[0].scheduler)
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)
    text = CLIPTextModel(CLIPTextConfig(**TEXT)).half()
    text.save_pretrained(folder / "text_encoder")
    for part, kind, config in (("unet", Unet, UnetConfig()), ("vae", AutoencoderKL, VaeConfig())):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
        weights = {name: t.half() for name, t in kind(config).state_dict().items()}
        save_file(weights, folder / part / "diffusion_pytorch_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.checkpoint:
        write_checkpoint(args.checkpoint)
        return
    with tempfile.TemporaryDirectory() as work:
        model, bundle = Path(work) / "model", Path(work) / "bundle"
        model.mkdir()
        # In a process of its own, so that the peak below is the build's alone.
        subprocess.run([sys.executable, __file__, "--checkpoint", str(model)], check=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        command = [sys.executable, "-m", "sdrt", "build", "--model", str(model)]
        command += ["--output", str(bundle), "--size", args.size]
        command += [] if args.fp32 else ["--fp16"]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        note = "" if peak > before else " (at most; making the weights took as much)"
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
        seconds = time.perf_counter() - began
        print(f"exit code {done.returncode}, {seconds:.0f} s")
        print(f"peak memory {peak / 1e6:.2f} GB{note}, bundle {size / 1e9:.2f} GB")
        if args.save and done.returncode == 0:
            dtype = "fp32" if args.fp32 else "fp16"
            said = f"{peak / 1e6:.1f} GB, {seconds:.0f} s, bundle {size / 1e9:.2f} GB"
            figures = {"peak_kb": peak, "seconds": seconds, "bundle_bytes": size}
            claim = f"peak memory of building full-size Stable Diffusion 1.5 in {dtype}"
            save(f"build_full_size_{dtype}", {claim: said}, figures)


if __name__ == "__main__":
    main()
