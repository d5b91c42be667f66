"""Folders and files that appear whole or not at all, by processes that are killed at every point of
making them.
"""

import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from killing import killed_at, points_of

from sdrt import atomic_files
from sdrt.atomic_files import locked, publish_folder, sibling, write_atomic
from sdrt.bundle.manifest import MANIFEST
from sdrt.bundle.store import find_bundle, list_bundles
from sdrt.errors import BundleError, SdrtError

pytestmark = pytest.mark.integration

OLD, NEW = b"old" * 1000, b"new" * 2000


def publish(target, content):
    with publish_folder(target, MANIFEST, force=True) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "model.onnx").write_bytes(content)
        (folder / MANIFEST).write_bytes(content)


def found_in(target):
    """What stands there whole, as one who opens it by its name finds it."""
    folder = find_bundle(target)
    contents = {(folder / name).read_bytes() for name in (MANIFEST, "unet/model.onnx")}
    assert len(contents) == 1
    return contents.pop()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    return tmp_path / "bundles" / "b"


@pytest.fixture(params=["exchanged", "renamed twice"])
def steps(request, monkeypatch):
    if request.param == "renamed twice":  # a flag that no kernel knows, as where there is none
        monkeypatch.setattr(atomic_files, "RENAME_EXCHANGE", 1 << 20)
    return request.param


def test_a_folder_replaced_under_a_kill_is_the_old_one_or_the_new(target, steps):
    publish(target, OLD)
    points = points_of(lambda: publish(target, NEW))
    assert ("fsync" in points and "os.rename" in points) or "renameat2" in points
    seen = set()
    for point in range(len(points)):
        publish(target, OLD)
        killed_at(point, lambda: publish(target, NEW))
        assert target.exists() or steps == "renamed twice"
        seen.add(found_in(target))
        assert list_bundles()[0] == target and not any(b.name[0] == "." for b in list_bundles())
        publish(target, NEW)
        assert found_in(target) == NEW and names_in(target.parent) == ["b"]
    assert seen == {OLD, NEW}


def test_a_first_folder_under_a_kill_is_whole_or_not_there(target):
    points = points_of(lambda: publish(target.with_name("other"), NEW))
    folders = [target.with_name(f"b{point:02}") for point in range(len(points))]
    complete = []
    for point, folder in enumerate(folders):
        killed_at(point, partial(publish, folder, NEW))
        try:
            complete.append(found_in(folder) == NEW)
        except BundleError:
            assert not [
                b
                for b in list_bundles()
                if b.name in (folder.name, sibling(folder, "partial").name)
            ]
        publish(folder, NEW)
        assert found_in(folder) == NEW
    assert all(complete) and 0 < len(complete) < len(points)
    assert names_in(target.parent) == [*(folder.name for folder in folders), "other"]


def test_a_file_under_a_kill_is_the_old_one_or_the_new(tmp_path):
    path = tmp_path / "a.json"
    seen = set()
    for point in range(len(points_of(lambda: write_atomic(path, NEW)))):
        write_atomic(path, OLD)
        killed_at(point, lambda: write_atomic(path, NEW))
        seen.add(path.read_bytes())
        write_atomic(path, NEW)
        assert path.read_bytes() == NEW and names_in(tmp_path) == ["a.json"]
    assert seen == {OLD, NEW}


def test_all_is_on_the_disk_before_it_has_its_name(target, monkeypatch):
    """A loss of power keeps what was flushed, so the order of the calls is what counts."""
    reported, fsync, swapped = [], os.fsync, atomic_files._exchange

    def seen_fsync(file):
        reported.append(str(Path(f"/proc/self/fd/{file}").resolve()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(
        atomic_files, "_exchange", lambda *two: reported.append("swap") or swapped(*two)
    )
    publish(target, OLD)
    reported.clear()
    publish(target, NEW)
    partial = sibling(target, "partial")
    before, after = reported[: reported.index("swap")], reported[reported.index("swap") + 1 :]
    names = ("", "/sdrt.json", "/unet", "/unet/model.onnx")
    assert {f"{partial}{name}" for name in names} == set(before)
    assert after == [str(target.parent)]
    reported.clear()
    write_atomic(path := target.with_name("a.json"), NEW)
    assert reported == [str(sibling(path, "partial")), str(path.parent)]


def test_many_who_make_the_same_come_one_after_the_other(target):
    inside, overlaps = [], []

    def make():
        for _ in range(20):
            with locked(target):
                inside.append(1)
                time.sleep(0.0005)
                overlaps.append(len(inside) > 1)
                inside.pop()

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(overlaps) == 120 and not any(overlaps)
    assert names_in(target.parent) == []


def test_who_makes_the_same_waits(target):
    began, order = threading.Event(), []

    def first():
        with publish_folder(target, MANIFEST, force=True) as folder:
            began.set()
            time.sleep(0.2)
            (folder / MANIFEST).write_bytes(OLD)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    began.wait()
    publish(target, NEW)
    order.append("second")
    thread.join()
    assert order == ["first", "second"] and found_in(target) == NEW
    with locked(target), pytest.raises(BlockingIOError), locked(target, wait=False):
        pass


ON_A_SMALL_DISK = """
import subprocess
from pathlib import Path
from sdrt.atomic_files import write_atomic
from sdrt.atomic_files import publish_folder

disk = Path("{folder}")
target = disk / "b"


def publish(content):
    with publish_folder(target, "sdrt.json", force=True) as folder:
        for name in ("1", "2", "3", "sdrt.json"):
            (folder / name).write_text(content * 5000)


def attempt(work, content):
    try:
        work(content)
    except Exception as error:
        return f"{{type(error).__name__}}: {{str(error).splitlines()[0].split(';')[0]}}"
    return "made"


def there():
    contents = {{path.read_text()[:1] for path in [*target.iterdir(), disk / "f"]}}
    return (*sorted(path.name for path in disk.iterdir()), *sorted(contents))


publish("o")
write_atomic(disk / "f", b"o" * 9000)
before = there()
for free in range(12, -1, -1):  # pages of 4096 bytes; the folder takes 8, the file 3
    filler = disk / "filler"
    filler.touch()
    with filler.open("wb", buffering=0) as file:
        while attempt(lambda c: file.write(c), b"x" * 4096) == "made":
            pass
        file.truncate(max(0, file.tell() - free * 4096))
    print(free, attempt(publish, "n"), attempt(lambda c: write_atomic(disk / "f", c), b"n" * 9000))
    filler.unlink()
    print(*there())
    publish("o")
    write_atomic(disk / "f", b"o" * 9000)
    assert there() == before
subprocess.run(["mount", "-o", "remount,ro", "{folder}"], check=True)
print("read-only", attempt(publish, "n"), attempt(lambda c: write_atomic(disk / "f", c), b"n"))
print(*there())
"""


def test_a_full_or_read_only_disk_leaves_the_old_and_nothing_else(tmp_path):
    """On a real one, full at every write in turn: a small file system in memory, in a mount
    namespace of its own.
    """
    script = tmp_path / "script.py"
    (folder := tmp_path / "disk").mkdir()
    script.write_text(ON_A_SMALL_DISK.format(folder=folder))
    mount = f"mount -t tmpfs -o size=160k tmpfs {folder}"
    command = ["unshare", "-Urm", "sh", "-c", f"{mount} && exec {sys.executable} {script}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode and not result.stdout:
        pytest.skip(f"no file system of its own: {result.stderr.strip()}")
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * 14, result.stderr
    no_space = "OSError: [Errno 28] No space left on device"
    full = f"StorageError: no space left to write {folder}/b {no_space}"
    seen = set()
    for said, there in zip(lines[::2], lines[1::2], strict=True):
        folder_made, file_made = "StorageError" not in said, "OSError" not in said
        seen.add((folder_made, file_made))
        assert there.split() == ["b", "f", *sorted({"on"[folder_made], "on"[file_made]})]
    assert lines[0] == "12 made made" and lines[-4] == f"0 {full}" and len(seen) == 3
    assert lines[-2].startswith(f"read-only StorageError: cannot write {folder}/b: Read-only file")


def test_a_folder_without_permission_is_said(target):
    target.parent.mkdir(parents=True)
    (closed := target.with_name("closed")).mkdir(mode=0)
    target.parent.chmod(0o500)

    def nobody():
        if os.getuid() == 0:
            os.setuid(65534)
        with pytest.raises(SdrtError, match=r"cannot write .*: Permission denied"):
            publish(target, NEW)
        with pytest.raises(BundleError, match="cannot be read: Permission denied"):
            find_bundle(closed)

    points_of(nobody)  # in a child, which fails if this does
    assert names_in(target.parent) == ["closed"]


@pytest.mark.slow
def test_killed_builds_end_with_the_same_bundle():
    """Every twentieth point of real builds; `make kill-points` has all of them."""
    script = Path(__file__).parents[2] / "benchmarks" / "kill_points.py"
    command = [sys.executable, script, "--every", "20", "--kills", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    actual, of = result.stdout.rpartition(" points recovered")[0].split()[-3::2]
    assert int(actual) == int(of) >= 10
