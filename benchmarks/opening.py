"""How long does each engine take to open a full-size bundle that is built and has been opened?

    python benchmarks/opening.py [--size 256x256] [--rounds 5] [--work FOLDER] [--engines A,B]
        [--save]

A process opens the bundle, draws an image of one step and ends; then the next engine's does. Said
are the medians: `sdrt.load`, or diffusers' loading of the checkpoint, and from the
process's start to the image. The first round only warms: it hashes files, and makes what an
engine keeps of a bundle. See latency.py for FOLDER.
"""

import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from latency import arguments
from published import made_bundle
from results import save

from sdrt.bench.report import BenchSettings, Contestant
from sdrt.bench.rounds import list_contestants, select_contestants, start_worker
from sdrt.bundle import Bundle, open_bundle


def opened(item: Contestant, bundle: Bundle, run: BenchSettings) -> dict[str, float]:
    """Seconds of loading, and to the first image, of a process of its own."""
    with tempfile.TemporaryDirectory() as result:
        start_worker(item, bundle, run, Path(result)).kill()
    return {"load": item.load_seconds, "picture": item.cold_start_seconds}


def median_of(turns: list[dict[str, float]], part: str) -> float:
    return statistics.median(times[part] for times in turns)


def main() -> None:
    args = arguments(__doc__, 5).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = open_bundle(made_bundle(args.work or Path(temporary), ["256x256", "512x512"]))
        actual: dict[str, list[dict[str, float]]] = defaultdict(list)
        for turn in range(args.rounds + 1):
            for item in select_contestants(list_contestants(bundle)[0], args.engines):
                times = opened(item, bundle, BenchSettings(args.size, (1,), 1))
                print("warms" if turn == 0 else f"turn {turn}", item.name, times, flush=True)
                if turn:
                    actual[item.name].append(times)
    claims = {
        f"loading a full-size bundle, {name}": f"{median_of(turns, 'load'):.1f} s; "
        f"{median_of(turns, 'picture'):.1f} s to a first image, {args.size}, 1 step"
        for name, turns in actual.items()
    }
    print(json.dumps(claims, indent=2))
    if args.save:
        save("opening", claims, {"turns": actual})


if __name__ == "__main__":
    main()
