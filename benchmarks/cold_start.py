"""How long from a process's start to a PNG on disk, and how much must be installed for it?

    python benchmarks/cold_start.py [--runs 5] [--install] [--save]

`sdrt run` and diffusers both draw the embedded model, 20 steps with guidance, on the
CPU: whole processes in turns, their medians, and what of them is Python's start and imports. With
`--install`, the size of two fresh environments as well, which pip fills (needs its index; minutes):
this project with `[cpu]`, and torch for the CPU with diffusers.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import save

ROOT = Path(__file__).parent.parent
PROMPT = "a red circle on a blue background"
IMPORTS = {
    "python alone": "",
    "import sdrt, sdrt.runtime": "import sdrt, sdrt.runtime",
    "import onnxruntime": "import onnxruntime",
    "import torch": "import torch",
    "import StableDiffusionPipeline": "from diffusers import StableDiffusionPipeline",
}
REFERENCE = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.to(dtype=torch.float32)
generator = torch.Generator("cpu").manual_seed(0)
image = pipe(sys.argv[2], num_inference_steps=20, guidance_scale=7.5, generator=generator).images[0]
image.save(sys.argv[3])
"""
ENVIRONMENTS = {
    "own": [".[cpu]"],
    "reference": ["torch", "diffusers", "transformers", "-c", "constraints.txt"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def timed(runs: int) -> dict[str, list[float]]:
    """Seconds of every process, in turns."""
    import sdrt

    checkpoint = str(Path(sdrt.__file__).parent / "models" / "shapes")
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder) / "a.png")
        run = [python, "-m", "sdrt", "run", PROMPT, "--bundle", "shapes"]
        commands = {
            **{name: [python, "-c", code] for name, code in IMPORTS.items()},
            "sdrt run": [*run, "--seed", "0", "--steps", "20", "--output", image],
            "reference": [python, "-c", REFERENCE, checkpoint, PROMPT, image],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                times[name].append(seconds(command))
    return times


def installed_bytes(expected: list[str]) -> int:
    """The size of a fresh environment with these, without pip and its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        before = bytes_of(Path(folder))
        pip = [str(Path(folder) / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", *expected], check=True, cwd=ROOT)
        return bytes_of(Path(folder)) - before


def bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--install", action="store_true", help="the environments' sizes too")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    times = timed(args.runs)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:32} {value:7.3f} s")
    alone = medians["python alone"]
    ratio = statistics.median(
        other / own for other, own in zip(times["reference"], times["sdrt run"], strict=True)
    )
    imports = {name: value - alone for name, value in medians.items() if name.startswith("import")}
    claims = {
        "from process start to a PNG, 20 steps": f"{medians['sdrt run']:.2f} s; diffusers "
        f"{medians['reference']:.2f} s ({ratio:.1f} ×)",
        "imports": "; ".join(f"`{k}` {1e3 * v:.0f} ms" for k, v in imports.items()),
    }
    figures: dict[str, object] = {"medians": medians, "times": times}
    if args.install:
        sizes = {name: installed_bytes(expected) for name, expected in ENVIRONMENTS.items()}
        figures["installed_bytes"] = sizes
        claims["installed size with dependencies"] = (
            f"{sizes['own'] / 1e6:.0f} MB; diffusers "
            f"{sizes['reference'] / 1e6:,.0f} MB ({sizes['reference'] / sizes['own']:.1f} ×)"
        )
    print(claims)
    if args.save:
        save("cold_start", claims, figures)


if __name__ == "__main__":
    main()
