"""A sample of `make test-rig` for `make test-rest`, in a process that the rigs may have."""

import subprocess
import sys

import driver_rig
import pytest
from disk_cache import REPOSITORY

SAMPLE = (
    "test_two_pipelines or test_texts_take_turns or test_after_a_fault or a_run_is_one_launch "
    "or refusal or arena_at_the_same or share_a_plan or interval0-DDIM or no_torch"
)


@pytest.mark.rest
def test_a_sample_of_the_gpu_path_runs_on_stand_ins():
    """What that shows, and what not, is in the docstrings of `driver_rig` and `runtime_rig`."""
    if reason := driver_rig.explain_unavailable():
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-m", "rig", "-k", SAMPLE, "tests/rigs"]
    done = subprocess.run(
        [*command, "tests/test_gpu.py"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
