"""How long it takes to exchange one embedding of many.

    python benchmarks/embedding_switch.py [--bundle NAME|FOLDER] [--files 200] [--save]

The files are made here. A switch unloads a word, loads its file again and reads a prompt with it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from results import save
from safetensors.numpy import save_file

import sdrt
import sdrt.runtime

ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def write_files(folder: Path, widths: dict[str, int], count: int, vectors: int) -> list[Path]:
    """Embedding files of random vectors, in the layout of XL."""
    rng = np.random.default_rng(0)
    paths = [folder / f"style-{i}.safetensors" for i in range(count)]
    for path in paths:
        arrays = {
            ENCODERS[part]: rng.normal(0, 0.02, (vectors, width)).astype(np.float32)
            for part, width in widths.items()
        }
        save_file(arrays, path)
    return paths


def switch(pipe: sdrt.runtime.Pipeline, path: Path) -> tuple[float, float]:
    """Seconds of one exchange: on the clock, and of the processor, which other programs that run
    at the same time do not lengthen.
    """
    began = time.perf_counter(), time.process_time()
    pipe.unload_textual_inversion(path.stem)
    pipe.load_textual_inversion(path)
    pipe.count_tokens(f"a painting in {path.stem}, a lighthouse")
    return time.perf_counter() - began[0], time.process_time() - began[1]


def describe(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.1f} ms (at most {max(seconds) * 1000:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="shapes")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--vectors", type=int, default=8, help="of each file (default: 8)")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as work,
        sdrt.load(args.bundle, backend="onnxruntime") as pipe,
    ):
        paths = write_files(Path(work), pipe.embeddings.widths, args.files, args.vectors)
        began = time.perf_counter()
        pipe.load_textual_inversion(paths)
        load = time.perf_counter() - began
        pairs = [switch(pipe, paths[i % len(paths)]) for i in range(args.rounds)]
        name, widths = pipe.manifest.name, dict(pipe.embeddings.widths)
    loaded = f"{args.files} embeddings of {args.vectors} vectors"
    clock, processor = ([pair[i] for pair in pairs] for i in range(2))
    claims = {
        f"exchanging one of {loaded}, {name}": f"{describe(processor)} of processor time; "
        f"{describe(clock)} on the clock"
    }
    print(claims)
    if args.save:
        figures = {"widths": widths, "load": load, "clock": clock, "processor": processor}
        save("embedding_switch", claims, figures)


if __name__ == "__main__":
    main()
