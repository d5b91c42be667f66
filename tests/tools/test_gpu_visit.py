"""The script for a visit to a GPU, without a GPU: what it would run can be imported there, runs
here, and stops in time.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdrt.engine.gpu import detect_gpus

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_visit.sh"
# Packages of development that a machine with torch, transformers and onnx need not have.
ABSENT = {
    *("cyclonedx", "diffusers", "fastapi", "httpx", "multipart", "open_clip", "openai", "openvino"),
    *("playwright", "polygraphy", "prometheus_client", "schemathesis", "shtab", "starlette"),
    *("tensorrt", "tensorrt_rtx", "torchsde", "tritonclient", "uvicorn", "webuiapi", "xdist"),
}
BLOCKED = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def visit(tmp_path, *arguments, **environment):
    places = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}
    places |= {"SITE": str(tmp_path / "site"), "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **places, **environment},
    )


def results_of(tmp_path):
    lines = (tmp_path / "out" / "visit.jsonl").read_text().splitlines()
    return {result["part"]: result for result in map(json.loads, lines)}


@pytest.mark.integration
@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "tests").glob("test_gpu*")))
def test_gpu_tests_are_collected_where_development_packages_are_absent(file):
    command = [sys.executable, "-c", BLOCKED, str(ROOT / "tests" / file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "tests collected" in done.stdout


def test_it_says_what_it_does_and_which_steps_there_are(tmp_path):
    done = visit(tmp_path)
    assert done.returncode == 2 and "sanitize  compute-sanitizer" in done.stdout
    assert "set -u" not in done.stdout
    asked = visit(tmp_path, "--help")
    assert asked.returncode == 0 and asked.stdout == done.stdout
    done = visit(tmp_path, "setup", "everything")
    assert done.returncode == 2 and "no step everything; expected pack setup" in done.stderr


@pytest.mark.skipif(not shutil.which("timeout"), reason="no timeout command")
def test_nothing_begins_when_no_time_is_left(tmp_path):
    done = visit(tmp_path, "--dry", "setup", LIMIT_SECONDS="5")
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path)
    assert {result["result"] for result in results.values()} == {"skipped"}
    assert "no time is left" in results["link"]["note"]


@pytest.mark.rest
def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(tmp_path):
    sleeper = tmp_path / "python"
    sleeper.write_text('#!/bin/sh\ncase "$1" in *link*) sleep 60;; *) echo ready;; esac\n')
    sleeper.chmod(0o755)
    done = visit(tmp_path, "--dry", "setup", LIMIT_SECONDS="22", PYTHON=str(sleeper))
    assert done.returncode == 1, done.stdout
    results = results_of(tmp_path)
    assert results["link"]["result"] == "stopped"
    assert results["packages"] == {**results["packages"], "result": "skipped"}


@pytest.mark.rest
@pytest.mark.integration
def test_a_dry_run_reaches_every_step(tmp_path):
    if detect_gpus().gpus:
        pytest.skip("there is a GPU, where the script itself is run")
    done = visit(tmp_path, "--dry", "setup", "loop", "torch", "ort", "sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    results = results_of(tmp_path)
    passed = {name for name, result in results.items() if result["result"] == "passed"}
    assert passed >= {
        *("link", "packages", "doctor", "embedded", "hidden", "torch-tests", "torch"),
        *("ort-tests", "ort"),
    }
    skipped = [result for result in results.values() if result["result"] == "skipped"]
    assert skipped and all(result["note"].strip() for result in skipped)
    figures = json.loads((tmp_path / "out" / "gpu-torch.json").read_text())
    assert figures["engines"]["torch"]["parts"]
    table = (tmp_path / "out" / "visit-table.txt").read_text()
    assert "| decode 32x32 |" in table and "torch-compiled         skipped" in table
