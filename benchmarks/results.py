"""Results that were measured, one JSON file each, and the README's table of them.

    python benchmarks/results.py            # write the table into README.md
    python benchmarks/results.py --check    # say whether the README has it

A benchmark run with `--save` keeps its figures in `benchmarks/results/` with the command, the
machine, the versions and the date.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PACKAGES = ("numpy", "onnxruntime", "torch", "diffusers", "transformers", "tensorrt-rtx")


def save(name: str, claims: dict[str, str], figures: dict[str, object]) -> None:
    """Keep a run: what the README says of it, by subject, and all its figures."""
    FOLDER.mkdir(exist_ok=True)
    result = {
        "claims": claims,
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "figures": figures,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def machine() -> str:
    """Processor, cores in use and system, in words."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {platform.system()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table() -> str:
    lines = ["| | measured | by |", "|---|---|---|"]
    for path in sorted(FOLDER.glob("*.json")):
        result = json.loads(path.read_text())
        where = f"`{result['command']}`, {result['machine']}, {result['date']}"
        lines += [f"| {what} | {found} | {where} |" for what, found in result["claims"].items()]
    return "\n".join([START, *lines, END])


def readme_with_table() -> str:
    text = README.read_text()
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return head + table() + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    wanted = readme_with_table()
    if args.check:
        sys.exit(0 if README.read_text() == wanted else "README.md: run benchmarks/results.py")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
