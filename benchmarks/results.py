"""Results that were measured, one JSON file each; the README's table and the plots come of them.

    python benchmarks/results.py            # write the table into README.md, and the plots
    python benchmarks/results.py --check    # say what is not what it would write

A benchmark run with `--save` keeps its figures in `benchmarks/results/` with the command, the
machine, the versions and the date.
"""

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path

from sdrt.bench.report import machine, versions
from sdrt.engine.selection import is_installed

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def save(name: str, claims: dict[str, str], figures: dict[str, object]) -> None:
    """Keep a run: what the README says of it, by subject, and all its figures."""
    FOLDER.mkdir(exist_ok=True)
    result = {
        "claims": claims,
        "command": command(sys.argv),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "figures": figures,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def command(arguments: list[str]) -> str:
    """What was typed, less where this machine keeps its files."""
    script, *given = arguments
    said = ("FOLDER" if Path(each).is_absolute() else each for each in given)
    return shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *said])


def table() -> str:
    """A table for every run, under what was typed."""
    lines = [START]
    for path in sorted(FOLDER.glob("*.json")):
        result = json.loads(path.read_text())
        lines += [f"`{result['command']}`, {result['machine']}, {result['date']}:", ""]
        lines += ["| | |", "|---|---|"]
        lines += [f"| {what} | {found} |" for what, found in result["claims"].items()]
        lines.append("")
    return "\n".join([*lines, END])


def readme_with_table() -> str:
    text = README.read_text("utf-8")
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return head + table() + tail


def plots() -> dict[Path, str]:
    """Every plot that is made of results, as SVG; none without matplotlib."""
    if not is_installed("matplotlib"):
        print("matplotlib is not installed: the plots stay as they are", file=sys.stderr)
        return {}
    import plots as drawn

    made = {}
    for name, draw in drawn.PLOTS.items():
        path = FOLDER / f"{name}.json"
        if path.exists() and (text := draw(json.loads(path.read_text("utf-8")))):
            made[path.with_suffix(".svg")] = text
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    wanted = {README: readme_with_table(), **plots()}
    stale = [
        path.name
        for path, text in wanted.items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    if args.check:
        sys.exit(f"{', '.join(stale)}: run make report" if stale else 0)
    for path, text in wanted.items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
