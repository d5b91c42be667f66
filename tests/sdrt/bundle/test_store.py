"""What a damaged, foreign or missing bundle says."""

import json
import shutil

import pytest

from sdrt.bundle import open_bundle, parse_size
from sdrt.bundle.store import find_bundle
from sdrt.errors import BundleError, UsageError


@pytest.fixture
def copy(shapes, tmp_path):
    return shutil.copytree(shapes, tmp_path / "copy")


def test_bundle_opens_by_name_folder_and_default(shapes):
    assert find_bundle("shapes") == find_bundle(str(shapes)) == find_bundle(None) == shapes


@pytest.mark.parametrize(
    "name", ["unet/model.safetensors", "unet/model.onnx", "tokenizer/merges.txt"]
)
def test_one_flipped_byte_is_found(copy, name):
    open_bundle(copy)
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(copy)


def test_a_missing_file_is_found(copy):
    (copy / "unet" / "model.onnx").unlink()
    with pytest.raises(BundleError, match="missing"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"surprise": 1}, "unknown fields in Manifest: 'surprise'"),
        ({"files": {"../escape": {"size": 1, "sha256": ""}}}, "outside the bundle"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "outside the bundle"),
        ({"sizes": "big"}, "not a manifest"),
        ({"components": {"magic": {}}}, "magic"),
        ({"batch": None}, "not a manifest"),
    ],
)
def test_a_strange_manifest_is_refused(copy, change, message):
    path = copy / "sdrt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_manifest_that_is_not_json_is_refused(copy, text):
    (copy / "sdrt.json").write_text(text)
    with pytest.raises(BundleError, match=r"sdrt\.json"):
        open_bundle(copy)


def test_without_any_bundle_the_hint_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    monkeypatch.setattr("sdrt.bundle.embedded.MODELS", tmp_path)
    with pytest.raises(BundleError, match="sdrt build --model shapes"):
        open_bundle(None)


@pytest.mark.parametrize("text", ["512", "0x0", "100x100", "512x-8", "8x8", "9999999x8", "axb", ""])
def test_bad_sizes_are_refused(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


def test_sizes_are_width_by_height():
    assert parse_size("768x512") == (768, 512)
