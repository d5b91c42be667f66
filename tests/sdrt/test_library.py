"""`sdrt.build` and `sdrt.bundles`."""

import inspect
import shutil
from dataclasses import fields

import pytest

import sdrt
from sdrt.export import build as export_build
from sdrt.export.build import BuildPlan


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    return tmp_path


def test_every_argument_of_a_build_reaches_it(shapes, monkeypatch):
    plans = []
    monkeypatch.setattr(export_build, "build_bundle", lambda plan: plans.append(plan) or shapes)
    bundle = sdrt.build(
        "tiny", output="folder", precision="fp16", sizes=["64x32"], loras=["a:0.5"], feature_reuse=1
    )
    assert bundle.folder == shapes
    (plan,) = plans
    assert (plan.model, str(plan.output), plan.dtype) == ("tiny", "folder", "float16")
    assert (plan.sizes, plan.loras, plan.feature_reuse) == (((64, 32),), ("a:0.5",), 1)
    parameters = set(inspect.signature(sdrt.build).parameters)
    assert parameters - {"precision"} == {f.name for f in fields(BuildPlan)} - {"dtype"}


def test_an_unknown_precision_is_refused():
    with pytest.raises(sdrt.UsageError, match="fp32 or fp16"):
        sdrt.build("shapes", precision="int8")


def test_bundles_are_listed_by_their_manifests(place, shapes):
    assert sdrt.bundles() == []
    folder = shutil.copytree(shapes, place / "bundles" / "mine")
    broken = place / "bundles" / "broken"
    broken.mkdir()
    (broken / "sdrt.json").write_text("{}")
    (info,) = sdrt.bundles()
    assert (info.name, info.path, info.precision) == ("shapes", folder, "fp32")
    assert info.family == "sd1" and info.sizes == ((64, 64),)
