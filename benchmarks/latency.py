"""How long do a guided UNet evaluation and a decode take on each engine here, and the reference's?

    python benchmarks/latency.py [--size 256x256] [--rounds 5] [--work FOLDER] [--engines A,B]
        [--compiled] [--save]
    python benchmarks/latency.py --xl --size 1024x1024 --rounds 2 --work FOLDER
        --engines 'reference bf16,openvino-bf16' [--save]

Full-size Stable Diffusion 1.5 with random weights, made and built in FOLDER (9 GB; kept there for
the next run if it is named), measured by `sdrt bench` in turns. Engines that memory has no room for
next to the others are left out: at 512x512 name three or so, such as
`--engines 'reference,openvino-bf16'`. `--compiled` measures the compiled reference library too,
which compiles for a minute, and keeps its figures next to the others'. `--xl` measures SDXL in half
precision, in a FOLDER of its own: 14 GB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from published import made_bundle
from results import save

from sdrt.engine.cpu import has_amx, has_bf16

PARTS = {"unet": "guided UNet evaluation", "decode": "decode"}


def benched(bundle: Path, *options: str) -> dict[str, Any]:
    """What `sdrt bench --json` says of a bundle."""
    command = [sys.executable, "-m", "sdrt", "bench", "--bundle", str(bundle), "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Those that every benchmark of a full-size bundle takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--engines", help="separated by commas, as sdrt bench takes them")
    parser.add_argument("--save", action="store_true", help="keep the figures for the README")
    return parser


def kind_of_processor() -> str:
    """What results of processors without bf16, or with AMX, have at the end of their names: the
    engines stand otherwise there.
    """
    return "_no_bf16" if not has_bf16() else "_amx" if has_amx() else ""


def said_of(report: dict[str, Any], engine: dict[str, Any], part: str) -> str:
    """One engine's figures of one part, next to every row of diffusers."""
    figures = engine["parts"][part]
    said = [f"{figures['p50']:.2f} s"]
    for base in report["engines"]:
        if base["name"].startswith("reference") and base is not engine:
            pairs = zip(base["parts"][part]["turns"], figures["turns"], strict=True)
            medians = ([statistics.median(turn["seconds"]) for turn in pair] for pair in pairs)
            faster = statistics.median(theirs / own for theirs, own in medians)
            said.append(f"{faster:.2f} × {base['name'].split(' ', 1)[1]}")
    if "of_limit" in figures:
        said.append(f"{figures['of_limit']:.0%} of peak")
    return ", ".join(said)


def main() -> None:
    parser = arguments(__doc__, 5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: minutes")
    parser.add_argument("--xl", action="store_true", help="SDXL")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if args.xl:
            bundle = made_bundle(work, [args.size], "--fp16", xl=True)
        else:
            bundle = made_bundle(work, ["256x256", "512x512"])
        options = ["--size", args.size, "--rounds", str(args.rounds), "--steps", "1"]
        options += ["--engines", args.engines] if args.engines else []
        options += ["--compiled"] if args.compiled else []
        report = benched(bundle, *options, "--parts", ",".join(PARTS))
    model = "SDXL, " if args.xl else ""
    claims = {
        f"full-size {model}{title}, {args.size}, {engine['name']}": said_of(report, engine, part)
        for part, title in PARTS.items()
        for engine in report["engines"]
        if part in engine["parts"]  # of some only whole images can be timed
    }
    print(json.dumps(claims, indent=2, ensure_ascii=False))
    if args.save:
        kind = kind_of_processor() + args.compiled * "_compiled"
        save(f"latency_{'xl_' * args.xl}{args.size}{kind}", claims, report)


if __name__ == "__main__":
    main()
