"""What is installed, under which licences, and what leaves with the wheel."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lock
import pytest
import third_party
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["package-dir"]
# Where files of a machine lie, at the beginning of a path.
ELSEWHERE = re.compile(rb"(?<![\w.~*/])(?:/home/|/root/|/tmp/|/work/|/Users/|[A-Z]:\\Users\\)[\w.]")
KINDS = {
    *(".py", ".typed", ".json", ".safetensors", ".onnx", ".txt", ".png", ".md"),
    *(".html", ".css", ".js", ".svg", ".header"),
}


def test_everything_asked_for_is_locked():
    locked = third_party.locked()
    extras = PROJECT["project"]["optional-dependencies"]
    asked = list(PROJECT["project"]["dependencies"])
    asked += [item for extra in lock.EXTRAS.split(",") for item in extras[extra]]
    for need in map(Requirement, asked):
        name = canonicalize_name(need.name)
        if name != "sdrt":
            assert need.specifier.contains(locked[name]), f"{need}: locked is {locked[name]}"


def test_the_lock_names_no_host():
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines


def test_the_lock_is_what_was_resolved(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "LOCK", tmp_path / "constraints.txt")
    actual = {"numpy": "2.4.6", "torch": "2.13.0+cpu", "sdrt": "0.1.0", "Pillow": "13.0.0"}
    monkeypatch.setattr(lock, "resolved", lambda *expected: actual)
    lock.main()
    assert (tmp_path / "constraints.txt").read_text().split("\n") == [
        *(lock.ABOVE + lock.BELOW).split("\n")[:-1],
        *("numpy==2.4.6", "Pillow==13.0.0", ""),
    ]


def test_licences_ask_for_no_more_than_notices():
    actual = third_party.packages()
    assert {"numpy", "onnxruntime", "torch", "fastapi"} <= set(actual)
    refused = {name: item.licence for name, item in actual.items() if name != "sdrt"}
    refused = {name: words for name, words in refused.items() if not third_party.permitted(words)}
    assert not refused


@pytest.mark.parametrize("licence", ["GPL-3.0-only", "MIT AND AGPL-3.0-or-later", "unknown", "?"])
def test_other_licences_are_refused(licence):
    assert not third_party.permitted(licence)


def test_the_list_of_licences_is_what_is_installed():
    locked = third_party.locked()
    drift = [name for name in third_party.packages() if name in locked and not same(name, locked)]
    if drift:
        pytest.skip(f"this environment is not constraints.txt's: {', '.join(drift)}")
    expected = (ROOT / "THIRD_PARTY.md").read_text()
    assert expected == third_party.table(), "type: python tools/third_party.py"


def same(name, locked):
    try:
        return version(name).split("+")[0] == locked[name]
    except PackageNotFoundError:
        return False


def built(folder):
    """The wheel of a copy of the sources that has been worked in."""
    source = folder / "source"
    leave = shutil.ignore_patterns("*.bundle", ".*.lock", "build", "*.egg-info")
    for name in PACKAGES.values():
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "runtime" / "__pycache__").mkdir(exist_ok=True)
    (source / "runtime" / "__pycache__" / "old.cpython-311.pyc").write_bytes(b"")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    epoch = {"SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | epoch)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(tmp_path_factory.mktemp("wheel"))


def check_contents(wheel):
    """Every source file is in it and little else: no tests, no tools, no data of trainings."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert archive.testzip() is None
        leaks = [name for name in names if ELSEWHERE.search(archive.read(name))]
    assert not leaks, "paths of a machine"
    sources = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    listed = PROJECT["tool"]["setuptools"]["packages"]
    inside = {"models", *(name.split(".")[1] for name in listed if "." in name)}
    assert {name.split("/")[0] for name in names} == {"sdrt"}
    assert {name.split("/")[1] for name in names if name.count("/") > 1} == inside
    assert {Path(name).suffix for name in names} <= KINDS
    assert not [name for name in names if re.search(r"__pycache__|test|train|\.lock", name)]


def check_bill(bill, wheel):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator  # takes seconds

    text = json.dumps(bill)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    (digest,) = bill["metadata"]["component"]["hashes"]
    assert digest["content"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    known = {item["bom-ref"] for item in bill["components"]}
    expected = {ref for item in bill["dependencies"] for ref in item["dependsOn"]}
    assert expected <= known
    required = {item["name"] for item in bill["components"] if item["scope"] == "required"}
    assert required == {"filelock", "numpy", "pillow", "psutil", "safetensors", "shtab", "tqdm"}


def test_the_wheel_holds_the_packages_and_no_more(wheel):
    check_contents(wheel)


def test_the_same_sources_give_the_same_wheel(wheel, tmp_path):
    assert built(tmp_path).read_bytes() == wheel.read_bytes()


def test_the_bill_of_materials_is_cyclonedx(wheel):
    check_bill(third_party.sbom(wheel), wheel)


@pytest.mark.release
def test_what_is_released():
    (wheel,) = (ROOT / "dist").glob("*.whl")
    check_contents(wheel)
    check_bill(json.loads(wheel.with_suffix(".cdx.json").read_text()), wheel)
