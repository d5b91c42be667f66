"""The embedded model's bundle gets its weights on first use, without torch."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdrt.bundle import open_bundle
from sdrt.bundle.embedded import (
    MODELS,
    embedded_folder,
    embedded_names,
    embedded_net_names,
    materialize,
)
from sdrt.bundle.integrity import hash_file
from sdrt.bundle.manifest import WEIGHTS
from sdrt.bundle.store import find_bundle, list_bundles
from sdrt.errors import BundleError, SdrtError

DRAW = """
import sys

for name in ("torch", "onnx", "onnx_ir", "onnxscript", "transformers"):
    sys.modules[name] = None  # as if it was not installed

from sdrt.cli.main import main
prompt = "a red circle on a blue background"
sys.exit(main(["run", prompt, "--seed", "0", "--reuse", "2", "--output", sys.argv[1]]))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A home without any bundle."""
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_first_image_needs_neither_torch_nor_onnx(place, tmp_path):
    from PIL import Image

    command = [sys.executable, "-c", DRAW, str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "image.png") as image:
        red, blue = image.convert("RGB").getpixel((32, 32)), image.convert("RGB").getpixel((3, 3))
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0]
    assert list_bundles() == [embedded_folder("shapes", place)]


def test_every_file_is_as_the_manifest_says_and_the_manifest_is_the_shipped_one(place):
    folder = find_bundle("shapes")
    assert (folder / "sdrt.json").read_bytes() == (MODELS / "shapes.bundle/sdrt.json").read_bytes()
    manifest = open_bundle(folder).manifest
    assert {name: hash_file(folder / name) for name in manifest.files} == {
        name: record.sha256 for name, record in manifest.files.items()
    }
    assert {"unet_shallow", "unet_control"} <= manifest.components.keys()
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {*manifest.files, "sdrt.json"}


def test_its_weights_and_graphs_are_those_of_a_built_bundle(place, shapes):
    built, embedded = open_bundle(shapes).manifest, open_bundle("shapes").manifest
    exported = {name for name in built.files if name.endswith((".onnx", WEIGHTS))}
    assert len(exported) == 11 and exported <= embedded.files.keys()
    assert all(embedded.files[name] == built.files[name] for name in exported)


def test_a_built_bundle_comes_first(place):
    embedded = find_bundle(None)
    built = Path(shutil.copytree(embedded, place / "bundles" / "shapes"))
    assert find_bundle(None) == find_bundle("shapes") == built
    assert list_bundles() == [built, embedded]


def test_two_processes_write_it_once(place):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        one, other = pool.starmap(materialize, [("shapes", place)] * 2)
    assert one == other and [path.name for path in one.parent.iterdir()] == ["shapes"]
    open_bundle(one)


def test_what_a_killed_process_left_is_replaced(place):
    target = embedded_folder("shapes", place)
    partial = target.with_name(".shapes.partial")
    (partial / "unet").mkdir(parents=True)
    (partial / "unet" / WEIGHTS).write_bytes(b"half")
    open_bundle(find_bundle("shapes"))
    assert not partial.exists()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's models, which a test may damage."""
    models = Path(shutil.copytree(MODELS, tmp_path / "models"))
    monkeypatch.setattr("sdrt.bundle.embedded.MODELS", models)
    return models


@pytest.mark.parametrize(
    "file",
    [
        "shapes/unet/diffusion_pytorch_model.safetensors",
        "shapes.bundle/unet/model.onnx",
        "shapes.bundle/constants.safetensors",
    ],
)
def test_a_damaged_package_is_refused_and_leaves_nothing(place, package, file):
    data = bytearray((package / file).read_bytes())
    data[-100] ^= 1
    (package / file).write_bytes(data)
    with pytest.raises(BundleError, match="damaged") as caught:
        find_bundle("shapes")
    assert caught.value.hint == "reinstall sdrt"
    assert not embedded_folder("shapes", place).exists()


def test_the_package_is_only_read(place, package):
    for path in package.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    open_bundle(find_bundle("shapes"))
    for path in package.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_home_that_is_not_a_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "file"))
    with pytest.raises(SdrtError, match=str(tmp_path / "file")):
        find_bundle("shapes")


def test_another_versions_folder_is_left_over(place, capsys):
    from sdrt.cli.main import main

    current = find_bundle("shapes")
    outdated = Path(shutil.copytree(current, place / "embedded" / "0123456789ab" / "shapes"))
    assert main(["gc", "--json"]) == 0
    (leftover,) = json.loads(capsys.readouterr().out)["leftovers"]
    assert leftover["path"] == str(outdated.parent)


def test_inspecting_without_any_bundle_shows_the_embedded_one(place, capsys):
    from sdrt.cli.main import main

    assert main(["inspect", "--json"]) == 0
    (described,) = json.loads(capsys.readouterr().out)
    assert described["name"] == "shapes"


def test_what_ships_is_small():
    assert embedded_names() == ["shapes"] and embedded_net_names() == ["likeness", "outline"]
    limits = {"shapes.bundle": 1e6, "outline.bundle": 1e5, "likeness.bundle": 5e5}
    for folder, limit in {**limits, "outline": 3e6, "likeness": 2e6}.items():
        files = [path for path in (MODELS / folder).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < limit


def test_the_embedded_control_bundle_is_no_model(place):
    folder = find_bundle("outline")
    assert open_bundle(folder).manifest.control_net == "controlnet"
    assert find_bundle(None) == find_bundle("shapes") != folder
    assert set(list_bundles()) == {folder, find_bundle("shapes")}
