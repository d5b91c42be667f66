"""`sdrt gc`: what is found, what is never touched, and what is gone afterwards."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
from plan_examples import KEY, build

from sdrt.atomic_files import file_identity, locked
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import Manifest, json_from_manifest
from sdrt.cli.gc import leftovers
from sdrt.cli.main import main
from sdrt.engine.gpu import Gpu, GpuInventory
from sdrt.engine.plans import get_or_build_plan
from sdrt.engine.tensorrt.variants import MODULES

HOLD = """
import os, sys, time
from pathlib import Path
from sdrt.atomic_files import publish_folder
with publish_folder(Path(sys.argv[1]), "sdrt.json", force=True) as folder:
    (folder / "weights").write_bytes(b"x" * 1000)
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def building(place):
    """A process that holds the lock of a bundle's build, in the middle of it."""
    command = [sys.executable, "-c", HOLD, str(place / "bundles" / "b")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def collected(capsys, *arguments):
    assert main(["gc", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def names(reported):
    return [item["path"].rpartition("/")[2] for item in reported["leftovers"]]


def test_what_a_killed_build_left_is_shown_and_freed(place, building, capsys):
    assert names(collected(capsys, "--yes")) == []  # its lock is held
    assert (place / "bundles" / ".b.partial" / "weights").exists()
    os.kill(building.pid, signal.SIGKILL)
    building.wait()
    reported = collected(capsys)
    assert names(reported) == [".b.lock", ".b.partial"] and reported["bytes"] == 1000
    assert not reported["freed"] and names(collected(capsys)) == names(reported)  # only shown
    assert collected(capsys, "--yes")["freed"]
    assert list((place / "bundles").iterdir()) == [] and names(collected(capsys)) == []


def test_what_is_begun_again_meanwhile_is_left(place):
    (place / "bundles" / ".b.partial").mkdir(parents=True)
    (actual,) = leftovers(GpuInventory())
    with locked(actual.target), pytest.raises(BlockingIOError):
        actual.free()
    assert actual.path.exists()


def test_an_old_bundle_without_a_new_one_is_put_back_and_never_freed(place, capsys):
    (old := place / "bundles" / ".b.old").mkdir(parents=True)
    (old / "sdrt.json").write_text("{}")
    assert names(collected(capsys, "--yes")) == []
    assert (place / "bundles" / "b" / "sdrt.json").is_file()


def test_what_stands_alone_is_not_taken_for_what_was_replaced(place, capsys):
    (place / "converted" / ".a.old").mkdir(parents=True)
    assert names(collected(capsys, "--yes")) == []
    (place / "converted" / "a").mkdir()
    assert names(collected(capsys, "--yes")) == [".a.old"]


@pytest.fixture
def plans(place):
    """Makes plans of a bundle that has a graph and weights of its UNet."""
    (folder := place / "bundles" / "b" / "unet").mkdir(parents=True)
    for name in ("model.onnx", "model.safetensors"):
        (folder / name).write_text(name)
    files = describe_files(folder.parent)
    manifest = Manifest(
        name="b",
        source="b",
        sizes=((64, 64),),
        batch=(1, 1, 4),
        latent_channels=4,
        downscale=8,
        max_tokens=32,
        opset=23,
        components={},
        parity={},
        preview=(),
        files=files,
    )
    (folder.parent / "sdrt.json").write_text(json_from_manifest(manifest))
    hashes = dict(zip(("graph", "weights"), (r.sha256 for r in files.values()), strict=True))
    key = replace(KEY, kind="none", system="linux-x86_64", gpu="", targets=("sm_89",), **hashes)
    return lambda **change: get_or_build_plan(
        folder.parent / "plans", replace(key, **change), build
    )


GPU = Gpu(0, "NVIDIA Test", "sm_89", 8 * 10**9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"targets": ("sm_120",)}, "for sm_120, here is sm_89"),
        ({"gpu": "NVIDIA Other"}, "for NVIDIA Other, here is NVIDIA Test"),
        ({"system": "windows-amd64"}, "for windows-amd64"),
        ({"graph": "0" * 64}, "for a graph or weights that the bundle no longer has"),
    ],
)
def test_plans_that_nothing_here_can_use_are_freed(place, plans, change, reason):
    fits, plan = plans(level=5), plans(**change)
    actual = list(leftovers(GpuInventory(gpus=(GPU,))))
    assert [leftover.path for leftover in actual] == ([plan.path] if reason else [])
    for leftover in actual:
        assert reason in leftover.reason
        leftover.free()
    assert plan.path.exists() == plan.path.with_suffix(".json").exists() == (reason is None)
    assert fits.path.exists() and not list(leftovers(GpuInventory(gpus=(GPU,))))


def test_without_a_gpu_plans_for_others_stay(plans):
    plans(targets=("sm_120",), gpu="NVIDIA Other")
    assert not list(leftovers(GpuInventory(unavailable_reason="none")))


def test_plans_of_another_version_are_freed(plans, monkeypatch):
    monkeypatch.setitem(MODULES, "tensorrt", "numpy")  # a package that is here
    plan = plans(kind="tensorrt", version="0.1")
    plans(kind="tensorrt", version=numpy.__version__)
    (actual,) = leftovers(GpuInventory())
    assert actual.path == plan.path and actual.reason.startswith("of tensorrt 0.1, here is")


def test_halves_of_plans_are_freed(plans):
    one, two = plans(level=1), plans(level=2)
    one.path.unlink()
    two.path.with_suffix(".json").unlink()
    actual = {leftover.path: leftover for leftover in leftovers(GpuInventory())}
    assert actual[one.path].reason == "a sidecar without its plan"
    assert actual[two.path].reason == "a plan without its sidecar"
    for leftover in actual.values():
        leftover.free()
    assert not one.path.with_suffix(".json").exists() and not two.path.exists()


def test_what_is_remembered_of_files_that_are_gone_is_forgotten(place, capsys):
    (path := place / "kept").write_text("kept")
    cached = {str(path): f"{file_identity(path.stat())}:hash"}
    memory = place / "verified.json"
    memory.write_text(json.dumps({**cached, "/nowhere": "1:2", str(place): "0:0"}))
    (stale,) = collected(capsys, "--yes")["leftovers"]
    assert stale["reason"] == "2 cached checks of files that were deleted or changed"
    assert json.loads(memory.read_text()) == cached
