"""Benchmark results, a JSON file each, and what is written from them: tables and plots.

    python benchmarks/results.py            # update the README, docs and the plots
    python benchmarks/results.py --check    # fail and name the files that are out of date

A benchmark run with `--save` stores its figures in `benchmarks/results/` with the command, the
machine, the versions and the date. A page shows them between two comments,

    <!-- results: NAME NAME -->
    <!-- results: end -->

where a NAME is that of a JSON file, or `summary` for the README's table.
"""

import argparse
import datetime
import json
import re
import shlex
import sys
from pathlib import Path

from sdrt.bench.report import list_versions, machine
from sdrt.engine.selection import is_installed

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "getting-started" / "installation.md",
    ROOT / "docs" / "serving" / "capacity.md",
    *sorted((ROOT / "docs" / "benchmarks").glob("*.md")),
)
BLOCK = re.compile(r"<!-- results: (?!end)([\w ]+?) -->\n(.*?)<!-- results: end -->", re.DOTALL)
COLUMNS = {
    "diffusers, fp32": "reference fp32",
    "diffusers, bf16": "reference bf16",
    "OpenVINO GenAI": "OpenVINO GenAI",
    "sdrt": "openvino-bf16",
}
ROWS = {
    "an image, 256x256, 20 steps": ("image_256x256", "full-size image, 256x256, 20 steps, {}"),
    "a guided UNet evaluation, 512x512": (
        "latency_512x512",
        "full-size guided UNet evaluation, 512x512, {}",
    ),
    "VAE decoding, 512x512": ("latency_512x512", "full-size decode, 512x512, {}"),
    "loading the model": ("opening", "loading a full-size bundle, {}"),
    "memory after an image, 512x512": (
        "memory_512x512",
        "memory at full size after one image, 512x512, {}",
    ),
}


def save(name: str, claims: dict[str, str], figures: dict[str, object]) -> None:
    """Store a run: a sentence by subject for the documentation, and all its figures."""
    FOLDER.mkdir(exist_ok=True)
    result = {
        "claims": claims,
        "command": command(sys.argv),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": list_versions(),
        "figures": figures,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def command(arguments: list[str]) -> str:
    """The command as it was run, without this machine's folders."""
    script, *options = arguments
    shown = ("FOLDER" if Path(option).is_absolute() else option for option in options)
    return shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *shown])


def table(name: str) -> str:
    """The claims of a result, under the command that measured them."""
    result = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    lines = [f"`{result['command']}`  ", f"{result['machine']}, {result['date']}", ""]
    lines += ["| measured | result |", "|---|---|"]
    # sdrt bench calls diffusers the reference.
    claims = {k.replace("reference ", "diffusers "): v for k, v in result["claims"].items()}
    lines += [f"| {subject} | {value} |" for subject, value in claims.items()]
    return "\n".join([*lines, ""])


def summary() -> str:
    """What users choose between, a row for each question."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title, (name, subject) in ROWS.items():
        claims = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["claims"]
        said = (claims.get(subject.format(column), "–") for column in COLUMNS.values())
        cells = [re.split(r"[,;(]", value)[0].strip() for value in said]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def fill(page: Path) -> str:
    """A page with its results as they are now."""

    def block(match: re.Match[str]) -> str:
        names = match[1].split()
        tables = [summary() if name == "summary" else table(name) for name in names]
        return "\n".join([f"<!-- results: {match[1]} -->", *tables, "<!-- results: end -->"])

    return BLOCK.sub(block, page.read_text("utf-8"))


def plots() -> dict[Path, str]:
    """Every plot of results, as SVG; none without matplotlib."""
    if not is_installed("matplotlib"):
        print("matplotlib is not installed: the plots stay as they are", file=sys.stderr)
        return {}
    import plots

    written = {}
    for name, plot in plots.PLOTS.items():
        path = FOLDER / f"{name}.json"
        if path.exists() and (text := plot(json.loads(path.read_text("utf-8")))):
            written[path.with_suffix(".svg")] = text
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    current = {**{page: fill(page) for page in PAGES}, **plots()}
    stale = [
        path
        for path, text in current.items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    if args.check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"{names}: run make report" if stale else 0)
    for path in stale:
        path.write_text(current[path], "utf-8")


if __name__ == "__main__":
    main()
