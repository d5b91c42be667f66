"""What the tests keep between runs is found again only for what it was built from."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from disk_cache import REPOSITORY, cached, hash_files, locked, prune
from exports import exported_once, exporter_hash, key_of
from torch import nn

from sdrt.export.graph import export_graph

KEY = "00ff"
WRITER = """
import sys, time
from pathlib import Path
from disk_cache import cached

def write(folder):
    (folder / "first").write_text("one")
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "last").write_text("two")

with cached(Path(sys.argv[1]), "00ff", write) as entry:
    print(sorted(file.name for file in entry.iterdir()), flush=True)
"""


def start_writer(folder, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests" / "helpers")},
    )


def entry_of(folder, key, content="x"):
    """Write an entry, or read it; returns how often it was written."""
    writes = []

    def write(partial):
        writes.append(partial)
        (partial / "file").write_text(content)

    with cached(folder, key, write) as entry:
        assert (entry / "file").read_text() == content
    return len(writes)


def test_an_entry_is_written_once(tmp_path):
    assert [entry_of(tmp_path, key) for key in (KEY, KEY, "01")] == [1, 0, 1]


def test_an_entry_that_failed_is_written_again(tmp_path):
    def fail(partial):
        (partial / "other").write_text("half")
        raise OSError

    with pytest.raises(OSError), cached(tmp_path, KEY, fail):
        pass
    assert entry_of(tmp_path, KEY) == 1
    assert [file.name for file in (tmp_path / KEY).iterdir()] == ["file"]


def test_a_killed_writer_leaves_no_entry(tmp_path):
    killed = start_writer(tmp_path, 600)
    assert killed.stdout.readline() == "writing\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / KEY).exists()
    assert start_writer(tmp_path, 0).communicate()[0] == "writing\n['first', 'last']\n"


def test_processes_wait_for_the_one_that_writes(tmp_path):
    first = start_writer(tmp_path, 0.5)
    assert first.stdout.readline() == "writing\n"
    assert start_writer(tmp_path, 0).communicate()[0] == "['first', 'last']\n"
    assert first.communicate()[0] == "['first', 'last']\n"


def test_old_entries_are_removed(tmp_path):
    for key, days in (("0a", 0), ("0b", 3), ("0c", 20)):
        entry_of(tmp_path, key)
        os.utime(tmp_path / key, (time.time() - days * 86_400,) * 2)
    assert prune(tmp_path) == ["0c"]
    assert entry_of(tmp_path, "0b") == 0  # and is new again
    assert prune(tmp_path, max_days=2) == []


def test_the_longest_unused_entries_above_the_size_are_removed(tmp_path):
    for key, days in (("0a", 1), ("0b", 3), ("0c", 2)):
        entry_of(tmp_path, key, content="x" * 100)
        os.utime(tmp_path / key, (time.time() - days * 86_400,) * 2)
    assert prune(tmp_path, max_bytes=200) == ["0b"]


def test_what_a_killed_writer_left_is_removed_and_what_is_in_use_stays(tmp_path):
    entry_of(tmp_path, "0a")
    (tmp_path / "0b.partial").mkdir()
    with locked(tmp_path, "0a"):
        assert prune(tmp_path, max_days=-1) == ["0b.partial"]
    assert prune(tmp_path, max_days=-1) == ["0a"]


@pytest.fixture
def sources(tmp_path):
    """A copy of what decides how a graph is exported."""
    shutil.copytree(REPOSITORY / "export", tmp_path / "export")
    (tmp_path / "sdrt" / "bundle").mkdir(parents=True)
    shutil.copy(REPOSITORY / "sdrt" / "bundle" / "manifest.py", tmp_path / "sdrt" / "bundle")
    return tmp_path


@pytest.mark.parametrize("name", ["export/graph.py", "export/unet.py", "sdrt/bundle/manifest.py"])
def test_changed_sources_are_exported_again(sources, name):
    exporter_hash.cache_clear()
    assert exporter_hash(sources) == exporter_hash(REPOSITORY)
    with (sources / name).open("a") as file:
        file.write("# changed\n")
    exporter_hash.cache_clear()
    assert exporter_hash(sources) != exporter_hash(REPOSITORY)


def test_a_renamed_source_is_another(tmp_path):
    (tmp_path / "a.py").touch()
    (tmp_path / "b.py").touch()
    assert hash_files(tmp_path, [tmp_path / "a.py"]) != hash_files(tmp_path, [tmp_path / "b.py"])


def test_another_version_of_a_package_exports_again(monkeypatch):
    before = exporter_hash(REPOSITORY)
    exporter_hash.cache_clear()
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 0")
    assert exporter_hash(REPOSITORY) != before
    exporter_hash.cache_clear()


class Scale(nn.Module):
    def __init__(self, factor=2.0, width=3):
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.weight * self.factor


def test_another_config_or_shape_is_exported_again(monkeypatch):
    x, rows = torch.zeros(2, 3), {"x": {0: "rows"}}
    cases = {
        "the same": (Scale(), {"x": x}, ["y"], {}),
        "a setting": (Scale(factor=3.0), {"x": x}, ["y"], {}),
        "a shape of weights": (Scale(width=1), {"x": x}, ["y"], {}),
        "a type": (Scale().half(), {"x": x}, ["y"], {}),
        "an input's name": (Scale(), {"z": x}, ["y"], {}),
        "an input's shape": (Scale(), {"x": x[:1]}, ["y"], {}),
        "an output's name": (Scale(), {"x": x}, ["z"], {}),
        "dynamic axes": (Scale(), {"x": x}, ["y"], rows),
        "another size": (Scale(), {"x": x[:, :1]}, ["y"], rows),
    }
    keys = [key_of(*case) for case in cases.values()]
    assert key_of(Scale(), {"x": x}, ["y"], {}) == keys[0]
    assert key_of(Scale(), {"x": x[:1]}, ["y"], rows) == keys[-2]
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr("exports.exporter_hash", lambda root: "another exporter")
    assert key_of(Scale(), {"x": x}, ["y"], {}) not in keys


class Project(nn.Module):
    """A weight that is stored transposed, and with a table a constant that is folded from one."""

    def __init__(self, seed, rows):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(3, 5)
        self.table = nn.Parameter(torch.randn(rows, 5)) if rows else None

    def forward(self, x):
        x = self.layer(x)
        return x if self.table is None else x + self.table[torch.arange(len(self.table))]


@pytest.mark.exports
@pytest.mark.parametrize("rows", [0, 8, 80], ids=["none", "in the graph", "in the file"])
def test_modules_of_other_weights_share_a_graph_without_folded_ones(tmp_path, monkeypatch, rows):
    monkeypatch.setenv("SDRT_TEST_CACHE", str(tmp_path / "cache"))
    signature = ("y",), {"x": {0: "rows"}}
    exported_once(Project(0, rows), {"x": torch.zeros(2, rows or 8, 3)}, *signature, tmp_path / "0")
    module, inputs = Project(1, rows), {"x": torch.zeros(4, rows or 8, 3)}
    specs = exported_once(module, inputs, *signature, tmp_path / "1")
    entries = list((tmp_path / "cache" / "exports").glob("[!.]*"))
    assert len(entries) == (2 if rows else 1)
    assert specs == export_graph(module, inputs, *signature, tmp_path / "expected")
    for name in ("model.onnx", "model.safetensors"):
        stored = (tmp_path / "1" / name).read_bytes()
        assert stored == (tmp_path / "expected" / name).read_bytes()
    assert stored != (tmp_path / "0" / name).read_bytes()
