"""Every attribute that `engine/` takes of TensorRT is looked up in the real bindings: of TensorRT
for RTX by class, of other versions by name (`tools/tensorrt_names.py` tells where from).
"""

import json
from functools import reduce

import pytest
from tensorrt_usage import CLASSES, OWN, ROOT, used, used_names


def test_tensorrt_for_rtx_has_every_attribute_that_is_used():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    actual = set(used())
    assert len(actual) > 55, sorted(actual)
    assert {kind for kind, _ in actual} == {"", *CLASSES.values(), *OWN.values()}
    for kind, name in actual:
        where = getattr(trt, kind) if kind else trt
        assert reduce(lambda at, part: getattr(at, part, None), name.split("."), where) is not None
    assert hasattr(trt.IAttentionInputLayer, "attention")


def test_other_versions_have_every_attribute_that_is_used():
    cached = json.loads((ROOT / "tests" / "engine" / "tensorrt" / "names.json").read_text())
    assert {version.split(".")[0] for version in cached} == {"10", "11"}
    for version, names in cached.items():
        missing = {name for _, name in used_names()} - set(names)
        assert not missing, f"{version} lacks {missing}, or run tools/tensorrt_names.py again"
