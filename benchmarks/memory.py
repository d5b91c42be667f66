"""How much memory does each engine hold at full size, and what do two processes share?

    python benchmarks/memory.py [--size 512x512] [--work FOLDER] [--engines A,B] [--one] [--save]

Each engine alone: two processes load one bundle, each draws an image of one step, then both are
asked: resident and peak, of the resident what is its own and what is mapped from files, and the
proportional share (PSS), which counts what both map once. `--one`: one process, for machines
without room for two. diffusers has one. Linux. See latency.py for FOLDER.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from latency import arguments
from published import made_bundle
from results import save

from sdrt.bench.report import BenchSettings, Contestant
from sdrt.bench.rounds import Worker, list_contestants, select_contestants, start_worker
from sdrt.bundle import Bundle, open_bundle
from sdrt.process_stats import memory


def held(item: Contestant, bundle: Bundle, run: BenchSettings, count: int) -> list[dict[str, int]]:
    """What every one of so many processes of an engine holds when all have drawn an image."""
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for i in range(count):
                (result := Path(folder) / str(i)).mkdir()
                workers.append(start_worker(item, bundle, run, result))
            return [memory(worker.process_id) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()


def said_of(actual: list[dict[str, int]], base: dict[str, int] | None) -> str:
    one = {name: value / 1e9 for name, value in actual[0].items()}
    text = (
        f"{one['resident']:.1f} GB ({one['anonymous']:.1f} private, "
        f"{one['mapped']:.1f} file-backed), peak {one['peak']:.1f} GB"
    )
    if base is not None:
        text += f", {actual[0]['resident'] / base['resident']:.0%} of diffusers fp32"
    if len(actual) > 1:
        both = sum(item["shared_out"] for item in actual) / 1e9
        text += f"; two processes {both:.1f} GB"
    return text


def main() -> None:
    parser = arguments(__doc__, 1)
    parser.add_argument("--one", action="store_true", help="one process of each")
    parser.set_defaults(size="512x512")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = open_bundle(made_bundle(args.work or Path(temporary), ["256x256", "512x512"]))
        actual: dict[str, list[dict[str, int]]] = {}
        for item in select_contestants(list_contestants(bundle)[0], args.engines):
            count = 1 if args.one or item.backend == "reference" else 2
            actual[item.name] = held(item, bundle, BenchSettings(args.size, (1,), 1), count)
            print(item.name, json.dumps(actual[item.name]), flush=True)
    base = actual["reference fp32"][0] if "reference fp32" in actual else None
    claims: dict[str, Any] = {
        f"memory at full size after one image, {args.size}, {name}": said_of(item, base)
        for name, item in actual.items()
    }
    print(json.dumps(claims, indent=2, ensure_ascii=False))
    if args.save:
        save(f"memory_{args.size}", claims, {"processes": actual})


if __name__ == "__main__":
    main()
