"""Does the first load of a bundle end, in a fresh process with nothing compiled before?

    python benchmarks/first_load.py BUNDLE [--backend openvino] [--processes 200]

Every process has a home of its own that is empty, loads the bundle, whose components are compiled
side by side, and makes an image; one that takes longer than the time-out hangs. To make that as
likely as it can be, threads change places every microsecond, products of every size are turned, as
in a large model, and all components come to it at the same moment.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHILD = """
import sys, threading
sys.setswitchinterval(1e-6)
import sdrt
from sdrt.engine import compile_cache
from sdrt.runtime import loading
compile_cache.MIN_WEIGHT_BYTES = 0
if sys.argv[2] == "openvino":
    from sdrt.engine.openvino import cache
    turned = openvino_plans._transpose_weights
    components = sdrt.bundle.open_bundle(sys.argv[1]).manifest.components
    together = threading.Barrier(len(set(loading.EAGER) & set(components)))
    def turned_together(model):
        together.wait()
        turned(model)
    openvino_plans._transpose_weights = turned_together
with sdrt.load(sys.argv[1], backend=sys.argv[2]) as pipe:
    pipe("a red circle", num_inference_steps=1, seed=0)
"""


def ended(bundle: Path, backend: str, seconds: float) -> bool:
    """Whether one process ends in time; raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-c", CHILD, str(bundle), backend]
        environment = {**os.environ, "SDRT_HOME": home}
        try:
            subprocess.run(command, env=environment, timeout=seconds, check=True)
        except subprocess.TimeoutExpired:
            return False
    return True


def hung(bundle: Path, backend: str, processes: int, at_once: int, seconds: float) -> int:
    """How many of so many processes do not end."""
    with ThreadPoolExecutor(at_once) as pool:
        tries = [pool.submit(ended, bundle, backend, seconds) for _ in range(processes)]
        return sum(not item.result() for item in tries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--processes", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--time-out", type=float, default=60.0, metavar="SECONDS")
    args = parser.parse_args()
    count = hung(args.bundle, args.backend, args.processes, args.at_once, args.time_out)
    print(f"{args.backend}: {count} of {args.processes} processes hang")


if __name__ == "__main__":
    main()
