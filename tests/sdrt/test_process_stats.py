"""What this process may use of the machine, as its control groups say."""

import os
import subprocess
import sys

import psutil
import pytest

from sdrt import process_stats
from sdrt.process_stats import available_bytes, cpu_count, memory, peak_bytes, resident_bytes


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("version 2", {"cpu.max": "150000 100000"}, 2),
        ("version 2, less than one", {"cpu.max": "20000 100000"}, 1),
        ("version 2, no limit", {"cpu.max": "max 100000"}, 8),
        ("version 1", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("version 1, no limit", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"}, 8),
    ],
)
def test_a_containers_quota_bounds_the_processors(tmp_path, monkeypatch, name, files, expected):
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(process_stats, "CGROUPS", tmp_path)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(8)))
    assert cpu_count() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_affinity_bounds_the_processors():
    script = (
        "import os; from sdrt.process_stats import cpu_count\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nprint(cpu_count())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"1\n"


def test_limits_of_the_groups_around_a_process_count(tmp_path, monkeypatch):
    """A service's memory limit stands in its slice, above its own group."""
    monkeypatch.setattr(process_stats, "CGROUPS", tmp_path)
    lines = "12:memory,cpu:/one\n0::/system.slice/sdrt.service\n"
    monkeypatch.setattr(process_stats, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(lines)
    (inner := tmp_path / "system.slice" / "sdrt.service").mkdir(parents=True)
    for folder, limit in ((inner, "max"), (inner.parent, "5000000")):
        for name, text in (
            ("memory.max", limit),
            ("memory.current", "1000000"),
            ("memory.stat", ""),
        ):
            (folder / name).write_text(text)
    assert available_bytes() == 4_000_000


def test_memory_of_a_process_that_is_gone_is_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = process.pid
    assert (memory(gone), resident_bytes(gone), peak_bytes(gone)) == ({}, 0, 0)


def test_this_process_is_within_its_peak():
    actual = memory()
    assert 0 < actual["resident"] <= actual["peak"] and resident_bytes() > 1_000_000
