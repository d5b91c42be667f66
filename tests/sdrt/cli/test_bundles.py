"""Which bundle is used: the one named, the default, or the only one."""

import json
import shutil

import pytest

from sdrt.bundle.bundle import open_bundle
from sdrt.bundle.store import bundles_folder, find_bundle
from sdrt.cli.main import main
from sdrt.errors import BundleError


@pytest.fixture
def two(shapes, tmp_path, monkeypatch):
    """Two bundles in a folder of their own."""
    source = open_bundle(shapes).folder
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    for name in ("shapes", "shapes-fp16"):
        shutil.copytree(source, bundles_folder() / name)
    return bundles_folder()


def test_two_bundles_need_a_choice(two, capsys):
    with pytest.raises(BundleError) as error:
        find_bundle(None)
    assert "shapes, shapes-fp16" in error.value.hint and "sdrt use" in error.value.hint
    assert main(["run", "a red circle"]) == 3
    assert "shapes, shapes-fp16" in capsys.readouterr().err


def test_the_default_is_what_use_sets(two, capsys):
    assert main(["use", "shapes-fp16"]) == 0
    assert find_bundle(None) == two / "shapes-fp16"
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert {row["name"]: row["default"] for row in rows} == {"shapes": False, "shapes-fp16": True}
    assert main(["list"]) == 0
    assert "* shapes-fp16  fp32" in capsys.readouterr().out


def test_a_removed_bundle_is_no_longer_the_default(two, capsys):
    assert main(["use", "shapes"]) == 0
    assert main(["remove", "shapes"]) == 0
    assert [path.name for path in two.iterdir()] == ["shapes-fp16"]
    assert find_bundle(None) == two / "shapes-fp16"


def test_only_bundles_of_the_user_are_removed(two, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(two / "shapes", elsewhere)
    assert main(["remove", str(elsewhere)]) == 3
    assert (elsewhere / "sdrt.json").is_file()


def test_the_embedded_bundle_counts_only_where_nothing_was_built(two):
    assert main(["use", "shapes-fp16"]) == 0
    assert main(["remove", "shapes"]) == 0
    assert find_bundle(None) == two / "shapes-fp16"
    assert main(["remove", "shapes-fp16"]) == 0
    assert find_bundle(None).parent != two


def test_the_embedded_bundle_is_listed_where_nothing_was_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    assert main(["list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["shapes"]


def test_a_home_that_cannot_exist_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDRT_HOME", "/proc/nowhere")
    assert main(["list"]) == 8
    assert "cannot write /proc/nowhere" in capsys.readouterr().err
