"""Every attribute that `engine/` takes of TensorRT is looked up in the real bindings: of TensorRT
for RTX by class, of other versions by name (`tools/tensorrt_names.py` tells where from).
"""

import ast
import json
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = (
    *("builder.py", "engine.py", "inspector.py"),
    *("loaded_plan.py", "progress.py", "variants.py"),
)
CLASSES = {  # what a variable of this name holds
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "layer": "ILayer",
    "attention": "IAttention",
    "query": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "inspector": "EngineInspector",
    "parser_refitter": "OnnxParserRefitter",
}
OWN = {  # the same name holds different things in different files
    ("builder.py", "config"): "IBuilderConfig",
    ("builder.py", "cache"): "ITimingCache",
    ("builder.py", "profile"): "IOptimizationProfile",
    ("builder.py", "error"): "ParserError",
    ("loaded_plan.py", "config"): "IRuntimeConfig",
    ("loaded_plan.py", "cache"): "IRuntimeCache",
}
# Not TensorRT's: `engine` is sometimes this project's own, `layer` becomes an attention's end.
OTHER = {
    ("ICudaEngine", "inputs"),
    ("ICudaEngine", "outputs"),
    ("ICudaEngine", "close"),
    ("ILayer", "__class__"),
    ("ILayer", "attention"),
}
RTX_ONLY = {"IRuntimeCache", "IRuntimeConfig"}
RTX_NAMES = {
    *("num_compute_capabilities", "set_compute_capability", "ComputeCapability"),
    *("ComputeCapability.__members__", "create_runtime_config"),
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr] if dotted(node.value) else []
    return [node.id] if isinstance(node, ast.Name) else []


def used():
    """(class or "", dotted name) of everything taken from TensorRT."""
    for name in FILES:
        for node in ast.walk(ast.parse((ROOT / "engine" / "tensorrt" / name).read_text())):
            parts = dotted(node) if isinstance(node, ast.Attribute) else []
            if not parts:
                continue
            kind = OWN.get((name, parts[0])) or CLASSES.get(parts[0])
            if parts[0] == "trt":
                yield "", ".".join(parts[1:])
            elif kind and (kind, parts[1]) not in OTHER:
                yield kind, parts[1]


def used_names():
    """(class, last part) of what `used` finds and the other versions must have too."""
    for kind, name in used():
        if kind not in RTX_ONLY and name not in RTX_NAMES:
            yield kind, name.split(".")[-1]


def test_tensorrt_for_rtx_has_every_attribute_that_is_used():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    found = set(used())
    assert len(found) > 55, sorted(found)
    assert {kind for kind, _ in found} == {"", *CLASSES.values(), *OWN.values()}
    for kind, name in found:
        where = getattr(trt, kind) if kind else trt
        assert reduce(lambda at, part: getattr(at, part, None), name.split("."), where) is not None
    assert hasattr(trt.IAttentionInputLayer, "attention")


def test_other_versions_have_every_attribute_that_is_used():
    kept = json.loads((ROOT / "tests" / "tensorrt_names.json").read_text())
    assert {version.split(".")[0] for version in kept} == {"10", "11"}
    for version, names in kept.items():
        missing = {name for _, name in used_names()} - set(names)
        assert not missing, f"{version} lacks {missing}, or run tools/tensorrt_names.py anew"
