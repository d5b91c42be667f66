"""How long does a build of full-size Stable Diffusion 1.5 take, how much memory, by stage?

    python benchmarks/build.py [--fp32] [--size 512x512] [--divisor 1] [--work FOLDER] [--save]
    python benchmarks/build.py --xl --size 1024x1024 --save             # SDXL
    python benchmarks/build.py --cpu-time --save     # where other processes use the machine

Weights are random, made first (in FOLDER, where they and the bundle stay for other benchmarks);
2 GB of disk in fp16, 5 GB with the checkpoint. Stages are recognized by the lines that a build
says; the peak of each is the kernel's, set back at its beginning. Linux; takes minutes, with
`--divisor 4` a sixteenth of that.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from published import made_checkpoint
from results import save

from sdrt.process_stats import forget_peak, peak_bytes


@dataclass(slots=True)
class Stage:
    """A chunk of a build. seconds: how long it took, and how long processors worked for
    it; peak: bytes held at most in it
    """

    name: str
    began: float
    began_cpu: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int = 0

    def end(self, cpu_seconds: float) -> None:
        self.seconds = time.perf_counter() - self.began
        self.cpu_seconds = cpu_seconds - self.began_cpu


def stages(process: "subprocess.Popen[str]") -> Iterator[Stage]:
    """Every stage, when it has ended; the lines are passed on."""
    assert process.stderr is not None
    stage, cpu_seconds = Stage("start", time.perf_counter()), 0.0
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        stage.peak = max(stage.peak, peak_bytes(process.pid))
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(process.pid).cpu_times()
            cpu_seconds = times.user + times.system
        if (name := beginning(line, stage.name)) != stage.name:
            stage.end(cpu_seconds)
            yield stage
            stage = Stage(name, time.perf_counter(), cpu_seconds)
            forget_peak(process.pid)
    stage.end(cpu_seconds)
    yield stage


def beginning(line: str, stage: str) -> str:
    """The stage that goes on after a line of a build."""
    if line.startswith("["):
        return line.split("] ")[1].split(":")[0]
    # Each component's validation is its last line; complete images follow the last one.
    if line.startswith("  ") and stage == "vae_encoder":
        return "end-to-end check"
    return "end" if line.startswith("done in") else stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--xl", action="store_true", help="SDXL")
    parser.add_argument("--divisor", type=int, default=1, help="of the widths of UNet and VAE")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--cpu-time", action="store_true", help="claim processors' seconds")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = made_checkpoint(args.work or Path(temporary), args.divisor, args.xl)
        bundle = model.with_name("bundle")
        command = [sys.executable, "-m", "sdrt", "build", "--model", str(model), "--force"]
        command += ["--output", str(bundle), "--size", args.size]
        command += [] if args.fp32 else ["--fp16"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        actual = [stage for stage in stages(process) if stage.name != "end"]
        if process.wait():
            sys.exit(f"the build ended with {process.returncode}")
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    for stage in actual:
        times = f"{stage.seconds:6.1f} s, {stage.cpu_seconds:6.1f} s of CPU"
        print(f"{stage.name:16} {times}  peak {stage.peak / 1e9:.2f} GB")
    counted = {s.name: s.cpu_seconds if args.cpu_time else s.seconds for s in actual}
    seconds, peak = sum(counted.values()), max(stage.peak for stage in actual)
    unit = "s of CPU" if args.cpu_time else "s"
    dtype = "fp32" if args.fp32 else "fp16"
    model_name = "SDXL" if args.xl else "Stable Diffusion 1.5"
    wide = args.divisor == 1
    model_name = f"full-size {model_name}" if wide else f"{model_name} at 1/{args.divisor} width"
    claims = {
        f"building {model_name} in {dtype}, all": f"peak {peak / 1e9:.1f} GB, "
        f"{seconds:.0f} {unit}, bundle {size / 1e9:.2f} GB",
        f"building {model_name} in {dtype}, by stage": "; ".join(
            f"{stage.name} {counted[stage.name]:.0f} {unit}, {stage.peak / 1e9:.1f} GB"
            for stage in actual
        ),
    }
    print(claims)
    if args.save:
        figures = {
            "bundle_bytes": size,
            "stages": {
                s.name: {
                    "seconds": s.seconds,
                    "cpu_seconds": s.cpu_seconds,
                    "peak_bytes": s.peak,
                }
                for s in actual
            },
        }
        model_key = "build_xl" if args.xl else "build"
        save(f"{model_key}_{dtype}" if wide else f"{model_key}_narrow", claims, figures)


if __name__ == "__main__":
    main()
