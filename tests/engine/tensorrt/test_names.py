"""Every attribute that `engine/` takes of TensorRT is looked up in the real bindings: of TensorRT
for RTX by class, of other versions by name (`tools/tensorrt_names.py` tells where from).
"""

import json
import re
import tomllib
from functools import reduce
from types import SimpleNamespace

import pytest
from tensorrt_usage import CLASSES, OWN, ROOT, used, used_names

from sdrt.engine.tensorrt.variants import ATTENTION_SINCE, Features, get_features

FLOOR = (10, 3)  # the version of JetPack 6
BY_FEATURE = {"attention": {"ATTENTION_INPUT", "IAttentionInputLayer", "decomposable"}}
TABLE = json.loads((ROOT / "tests" / "engine" / "tensorrt" / "names.json").read_text())


def version_of(text):
    return tuple(int(part) for part in text.split(".")[:2])


def test_tensorrt_for_rtx_has_every_attribute_that_is_used():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    actual = set(used())
    assert len(actual) > 55, sorted(actual)
    assert {kind for kind, _ in actual} == {"", *CLASSES.values(), *OWN.values()}
    for kind, name in actual:
        where = getattr(trt, kind) if kind else trt
        assert reduce(lambda at, part: getattr(at, part, None), name.split("."), where) is not None
    assert hasattr(trt.IAttentionInputLayer, "attention")
    assert get_features(trt) == Features(attention=True, asks_capturable=True)


def test_the_oldest_version_has_every_attribute_that_no_feature_guards():
    guarded = set().union(*BY_FEATURE.values())
    for name in {name for _, name in used_names()} - guarded:
        since = TABLE["since"].get(name)
        assert since, f"{name} is not in the newest TensorRT, or run tools/tensorrt_names.py again"
        assert version_of(since) <= FLOOR, f"{name} is not in TensorRT {FLOOR}, but in {since}"


def test_a_feature_begins_with_the_names_that_it_guards():
    versions = {version_of(version) for version in TABLE["versions"]}
    assert {FLOOR, ATTENTION_SINCE, max(versions)} <= versions
    assert {version_of(TABLE["since"][name]) for name in BY_FEATURE["attention"]} == {
        ATTENTION_SINCE
    }
    for text in TABLE["versions"]:
        module = SimpleNamespace(__name__="tensorrt", __version__=text)
        expected = Features(version_of(text) >= ATTENTION_SINCE, asks_capturable=False)
        assert get_features(module) == expected


def test_the_package_asks_for_no_newer_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (floor,) = (
        re.search(r">=([\d.]+)", requirement)[1]
        for requirement in project["optional-dependencies"]["gpu"]
        if requirement.startswith("tensorrt")
    )
    assert version_of(floor) == FLOOR
