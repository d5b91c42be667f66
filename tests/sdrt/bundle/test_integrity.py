"""What is remembered of a bundle's files that were hashed, and what makes it be forgotten."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from sdrt.bundle import integrity
from sdrt.bundle.integrity import check_files, describe_files
from sdrt.bundle.manifest import Manifest
from sdrt.errors import BundleError

NAME = "unet/model.safetensors"
HOUR = 3600 * 10**9


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "home"))
    (tmp_path / "b" / "unet").mkdir(parents=True)
    (tmp_path / "b" / NAME).write_bytes(b"weights" * 100)
    return tmp_path / "b"


@pytest.fixture
def hashed(monkeypatch):
    """The files whose bytes are read."""
    read, seen = integrity.hash_file, []
    monkeypatch.setattr(integrity, "hash_file", lambda path: seen.append(path.name) or read(path))
    return seen


def manifest_of(folder):
    values = dict.fromkeys(Manifest.__dataclass_fields__, None)
    return Manifest(**{**values, "files": describe_files(folder)})


def test_a_file_is_hashed_once(folder, hashed):
    manifest = manifest_of(folder)
    hashed.clear()
    check_files(folder, manifest.files)
    check_files(folder, manifest.files)
    assert hashed == ["model.safetensors"]


def test_an_edit_that_puts_size_and_time_back_is_found(folder):
    manifest = manifest_of(folder)
    check_files(folder, manifest.files)
    path = folder / NAME
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"W")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    same = ("st_size", "st_mtime_ns", "st_ino", "st_dev")
    assert all(getattr(before, name) == getattr(after, name) for name in same)
    with pytest.raises(BundleError, match="damaged"):
        check_files(folder, manifest.files)


@pytest.mark.parametrize("hours", [-10_000, 10_000])
def test_a_clock_that_jumps_only_has_it_hashed_again(folder, hashed, hours):
    manifest = manifest_of(folder)
    check_files(folder, manifest.files)
    hashed.clear()
    os.utime(folder / NAME, ns=(0, time.time_ns() + hours * HOUR))
    check_files(folder, manifest.files)
    check_files(folder, manifest.files)
    assert hashed == ["model.safetensors"]


def test_what_is_checked_side_by_side_is_all_remembered(folder, hashed):
    names = [f"unet/{i}.safetensors" for i in range(40)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    files = manifest_of(folder).files
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: check_files(folder, {name: files[name]}), names))
    hashed.clear()
    check_files(folder, {name: files[name] for name in names})
    assert hashed == []


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_a_bundle_in_another_place_is_hashed_again(folder, hashed, how):
    manifest = manifest_of(folder)
    check_files(folder, manifest.files)
    hashed.clear()
    check_files(how(folder, folder.with_name("c")), manifest.files)
    assert hashed == ["model.safetensors"]


def test_a_memory_of_other_bytes_counts_for_nothing(folder):
    manifest = manifest_of(folder)
    check_files(folder, manifest.files)
    record = replace(manifest.files[NAME], sha256="0" * 64)
    with pytest.raises(BundleError, match="damaged"):
        check_files(folder, {NAME: record})


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "\x00", '{"a"'])
def test_a_damaged_memory_is_no_memory(folder, hashed, text):
    manifest = manifest_of(folder)
    (memory := folder.parent / "home" / "verified.json").parent.mkdir()
    memory.write_text(text)
    hashed.clear()
    check_files(folder, manifest.files)
    check_files(folder, manifest.files)
    assert hashed == ["model.safetensors"]
