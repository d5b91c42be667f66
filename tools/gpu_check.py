"""`make gpu-check`: every test marked `gpu`, and what of `engine/` they reached.

    python tools/gpu_check.py

Writes `benchmarks/results/<gpu>-<date>.json`. Says why, and ends with 1, where there is no GPU.
"""

import datetime
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from sdrt.cli.doctor import diagnose
from sdrt.engine.gpu import detect_gpus

ROOT = Path(__file__).parent.parent
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def run_tests(folder: Path) -> int:
    """The exit code of pytest; its report and the coverage's are left in the folder."""
    data = f"--data-file={folder / 'coverage'}"
    command = [sys.executable, "-m", "coverage", "run", data, "--source=sdrt.engine", "-m"]
    tests = map(str, sorted((ROOT / "tests").glob("test_gpu*.py")))  # others need more packages
    options = ["pytest", *tests, "-m", "gpu", f"--junitxml={folder / 'tests.xml'}"]
    done = subprocess.run([*command, *options], cwd=ROOT)
    report = [sys.executable, "-m", "coverage", "json", data, "-o", str(folder / "coverage.json")]
    subprocess.run(report, cwd=ROOT)
    return done.returncode


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Of every test: passed, failed or skipped, and the reason."""
    actual = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bounds = [end for end in case if end.tag in ("failure", "error", "skipped")]
        outcome = (
            {"failure": "failed", "error": "failed"}.get(bounds[0].tag, "skipped") if bounds else ""
        )
        reason = bounds[0].get("message", "").split("\n")[0] if bounds else ""
        actual[f"{case.get('classname')}::{case.get('name')}"] = {
            "outcome": outcome or "passed",
            "reason": reason,
        }
    return actual


def coverage_of(report: Path) -> dict[str, float]:
    """Percent of the lines of every file of `engine/` that ran."""
    files = json.loads(report.read_text())["files"] if report.exists() else {}
    return {Path(name).name: actual["summary"]["percent_covered"] for name, actual in files.items()}


def main() -> None:
    machine = detect_gpus()
    if machine.unavailable_reason:
        sys.exit(f"gpu-check: {machine.unavailable_reason}; nothing was checked")
    name = re.sub(r"[^a-z0-9]+", "-", machine.gpus[0].name.lower()).strip("-")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    with tempfile.TemporaryDirectory() as temporary:
        code = run_tests(Path(temporary))
        tests = outcomes(Path(temporary) / "tests.xml")
        coverage = coverage_of(Path(temporary) / "coverage.json")
    counts = {
        outcome: sum(test["outcome"] == outcome for test in tests.values())
        for outcome in ("passed", "failed", "skipped")
    }
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    result = {
        "claims": {f"GPU tests on {machine.gpus[0].name}": said},
        "command": "make gpu-check",
        "machine": f"{machine.gpus[0].name}, driver {machine.driver}",
        "date": date,
        "versions": diagnose()["packages"],
        "figures": {"tests": tests, "coverage_percent": coverage},
    }
    out = ROOT / "benchmarks" / "results" / f"{name}-{date}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{said}; {out}")
    sys.exit(code)


if __name__ == "__main__":
    main()
