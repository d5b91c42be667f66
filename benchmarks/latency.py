"""How long a guided UNet evaluation and a decode take on each engine here, next to the reference.

    python benchmarks/latency.py [--size 256x256] [--rounds 5] [--work FOLDER] [--engines A,B]
        [--save]

Full-size Stable Diffusion 1.5 with random weights, made and built in FOLDER (9 GB; kept there for
the next run if it is named). Every engine lives in a process of its own; they take turns, and
ratios are taken round by round, so that a machine that drifts favours none. All five at once need
more than 24 GB at 512x512.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from results import save

ENGINES = {
    "reference fp32": ("torch", "float32"),
    "reference bf16": ("torch", "bfloat16"),
    "onnxruntime": ("onnxruntime", "exact"),
    "openvino": ("openvino", "exact"),
    "openvino bf16": ("openvino", "auto"),
}
BASE = "reference fp32"


def feeds(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Two rows: one guided picture."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 4, size[1] // 8, size[0] // 8)).astype(np.float32)
    context = rng.normal(size=(2, 77, 768)).astype(np.float32)
    return {"sample": latents, "timestep": np.full(2, 500, np.float32), "context": context}


def reference(checkpoint: Path, dtype: str):
    """The reference library's modules, channels last in bf16, as its users run them."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = getattr(torch, dtype)
    unet = UNet2DConditionModel(cross_attention_dim=768)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    from safetensors.torch import load_file

    for module, part in ((unet, "unet"), (vae, "vae")):
        path = checkpoint / part / "diffusion_pytorch_model.safetensors"
        module.load_state_dict(load_file(path))
        module.to(kind).eval()
        if dtype == "bfloat16":
            module.to(memory_format=torch.channels_last)

    def run_unet(fed: dict[str, np.ndarray]) -> None:
        given = {name: torch.from_numpy(array).to(kind) for name, array in fed.items()}
        with torch.no_grad():
            unet(given["sample"], given["timestep"], given["context"])

    def run_vae(fed: dict[str, np.ndarray]) -> None:
        with torch.no_grad():
            vae.decode(torch.from_numpy(fed["sample"][:1]).to(kind) / 0.18215)

    return run_unet, run_vae


def own(bundle: Path, backend: str, precision: str):
    import sdrt

    pipe = sdrt.load(bundle, backend=backend, precision=precision)

    def run_unet(fed: dict[str, np.ndarray]) -> None:
        pipe.engines["unet"](fed)

    def run_vae(fed: dict[str, np.ndarray]) -> None:
        pipe.engines["vae_decoder"]({"latents": fed["sample"][:1]})

    return run_unet, run_vae


def work(name: str, folder: Path, size: tuple[int, int]) -> None:
    """A worker: loads, then answers every line with the seconds that its part took."""
    kind, precision = ENGINES[name]
    began = time.perf_counter()
    if kind == "torch":
        unet, vae = reference(folder / "model", precision)
    else:
        unet, vae = own(folder / "bundle", kind, precision)
    fed = feeds(size)
    loaded = time.perf_counter() - began
    for run in (unet, vae):
        run(fed)
    print(loaded, flush=True)
    for line in sys.stdin:
        part = {"unet": unet, "vae": vae}.get(line.strip())
        if part is None:
            break
        began = time.perf_counter()
        part(fed)
        print(time.perf_counter() - began, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


def measured(
    folder: Path, size: str, rounds: int, engines: list[str]
) -> dict[str, dict[str, object]]:
    workers, found = {}, {}
    for name in engines:
        command = [sys.executable, __file__, "--worker", name, "--work", str(folder)]
        process = subprocess.Popen(
            [*command, "--size", size], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        found[name] = {"load_s": float(process.stdout.readline()), "unet_s": [], "vae_s": []}
        workers[name] = process
        print(f"{name:16} loaded in {found[name]['load_s']:.1f} s", flush=True)
    for _ in range(rounds):
        for part in ("unet", "vae"):
            for name, process in workers.items():
                process.stdin.write(part + "\n")
                process.stdin.flush()
                found[name][f"{part}_s"].append(float(process.stdout.readline()))
    for name, process in workers.items():
        process.stdin.write("end\n")
        process.stdin.flush()
        found[name]["peak_kb"] = int(process.stdout.readline())
        process.wait()
    return found


def ratio(found: dict, name: str, part: str) -> float:
    """How many times faster than the base, the median of the rounds."""
    pairs = zip(found[BASE][part], found[name][part], strict=True)
    return statistics.median(base / own for base, own in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--engines", default=",".join(ENGINES), help="separated by commas")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    width, height = (int(part) for part in args.size.split("x"))
    if args.worker:
        work(args.worker, args.work, (width, height))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        if not (folder / "bundle").exists():
            (folder / "model").mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(Path(__file__).with_name("build_full_size.py"))]
            subprocess.run([*command, "--checkpoint", str(folder / "model")], check=True)
            build = [sys.executable, "-m", "sdrt", "build", "--model", str(folder / "model")]
            sizes = ["--size", "256x256", "--size", "512x512"]
            subprocess.run([*build, *sizes, "--output", str(folder / "bundle")], check=True)
        found = measured(folder, args.size, args.rounds, args.engines.split(","))
    for name, values in found.items():
        unet, vae = (statistics.median(values[part]) for part in ("unet_s", "vae_s"))
        print(
            f"{name:16} unet {unet:6.2f} s ({ratio(found, name, 'unet_s'):.2f} x)  decode "
            f"{vae:6.2f} s ({ratio(found, name, 'vae_s'):.2f} x)  peak "
            f"{values['peak_kb'] / 1e6:.1f} GB"
        )
    if args.save:
        claims = {}
        for name, values in found.items():
            seconds = statistics.median(values["unet_s"])
            claims[f"full-size guided UNet evaluation, {args.size}, {name}"] = (
                f"{seconds:.2f} s, {ratio(found, name, 'unet_s'):.2f} × the reference's fp32"
            )
        save(f"latency_{args.size}", claims, {"engines": found})


if __name__ == "__main__":
    main()
