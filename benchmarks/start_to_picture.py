"""From process start to a PNG on disk, against the reference library, in one interleaved run.

    python benchmarks/start_to_picture.py [--runs N] [--save]

Both draw the embedded model, 20 steps with guidance, on the CPU; medians of whole processes.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import save

PROMPT = "a red circle on a blue background"
REFERENCE = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.to(dtype=torch.float32)
generator = torch.Generator("cpu").manual_seed(0)
image = pipe(sys.argv[2], num_inference_steps=20, guidance_scale=7.5, generator=generator).images[0]
image.save(sys.argv[3])
"""


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    import sdrt

    checkpoint = str(Path(sdrt.__file__).parent / "models" / "shapes")
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "a.png")
        run = [python, "-m", "sdrt", "run", PROMPT, "--bundle", "shapes"]
        commands = {
            "python alone": [python, "-c", ""],
            "import sdrt, sdrt.runtime": [python, "-c", "import sdrt, sdrt.runtime"],
            "sdrt run": [*run, "--seed", "0", "--steps", "20", "--output", picture],
            "reference": [python, "-c", REFERENCE, checkpoint, PROMPT, picture],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.runs):
            for name, command in commands.items():
                times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:28} {value:7.3f} s")
    start = medians["import sdrt, sdrt.runtime"] - medians["python alone"]
    print(f"{'the import itself':28} {start * 1000:7.0f} ms")
    ratio = medians["reference"] / medians["sdrt run"]
    print(f"reference / sdrt             {ratio:7.1f} x")
    if args.save:
        claims = {
            "from process start to a PNG, 20 steps": f"{medians['sdrt run']:.2f} s; the reference "
            f"library {medians['reference']:.2f} s ({ratio:.1f} ×)",
            "`import sdrt, sdrt.runtime`": f"{start * 1000:.0f} ms",
        }
        save("start_to_picture", claims, {"medians": medians, "times": times})


if __name__ == "__main__":
    main()
