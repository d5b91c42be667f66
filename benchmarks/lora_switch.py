"""How long it takes to put a LoRA file on, change it and take it off again.

    python benchmarks/lora_switch.py [--bundle NAME|FOLDER] [--backends A,B] [--save]

The file is made here: rank 16, every attention and feed-forward layer of UNet and text encoder, as
most published ones are.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from results import save
from safetensors.numpy import save_file

import sdrt
import sdrt.runtime
from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import TRANSPOSED
from sdrt.bundle.safetensors import Tensors

RANK = 16
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "q_proj", "k_proj", "v_proj")


def write_lora(
    folder: Path,
    path: Path,
    seed: int,
    rank: int = RANK,
    parts: Sequence[str] = ("unet", "text_encoder"),
    scale: float = 0.01,
) -> int:
    """A file for a bundle, with factors of this standard deviation; returns how many layers it
    changes.
    """
    rng = np.random.default_rng(seed)
    saved = {}
    for part in parts:
        tensors = Tensors(folder / part / "model.safetensors")
        for name in tensors:
            module = name.removesuffix(TRANSPOSED).removesuffix(".weight")
            if not module.endswith(LAYERS) or not name.endswith(TRANSPOSED):
                continue
            inside, outside = tensors.shape(name)
            down = rng.standard_normal((rank, inside), np.float32)
            up = rng.standard_normal((outside, rank), np.float32)
            key = f"{part}.{module.removeprefix('model.')}"
            saved |= {f"{key}.lora_A.weight": down * scale, f"{key}.lora_B.weight": up * scale}
    save_file(saved, path)
    return len(saved) // 2


def timed(pipe: sdrt.runtime.Pipeline, loras: dict[Path, float]) -> float:
    began = time.perf_counter()
    pipe.set_lora(loras)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle")
    parser.add_argument("--backends", default="onnxruntime,openvino,torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    figures, said = {}, []
    with tempfile.TemporaryDirectory() as work:
        a, b = Path(work) / "a.safetensors", Path(work) / "b.safetensors"
        layers = write_lora(bundle.folder, a, 0)
        write_lora(bundle.folder, b, 1)
        print(f"{bundle.manifest.name}: {layers} layers, {a.stat().st_size / 1e6:.1f} MB a file")
        for backend in args.backends.split(","):
            began = time.perf_counter()
            with sdrt.load(bundle.folder, backend=backend) as pipe:
                load = time.perf_counter() - began
                pipe.set_lora({a: 0.8})
                switches = [timed(pipe, {file: 0.8}) for file in [b, a] * args.rounds]
                off = timed(pipe, {})
            switch = float(np.median(switches))
            figures[backend] = {"load": load, "switch": switch, "off": off}
            said.append(f"{switch:.2f} s {backend}")
            print(f"{backend:12} load {load:.2f} s  switch {switch:.2f} s  off {off:.2f} s")
    if args.save:
        claim = f"from one LoRA file to another ({layers} layers), {bundle.manifest.name}"
        save(f"lora_switch_{bundle.manifest.name}", {claim: ", ".join(said)}, figures)


if __name__ == "__main__":
    main()
