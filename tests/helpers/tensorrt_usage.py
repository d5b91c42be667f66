"""The names that the package takes from TensorRT, read from its source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = (
    *("builder.py", "engine.py", "inspector.py"),
    *("loaded_plan.py", "progress.py", "refitting.py", "variants.py"),
)
CLASSES = {  # what a variable of this name holds
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "layer": "ILayer",
    "attention": "IAttention",
    "query": "ITensor",
    "runtime": "Runtime",
    "strategy": "ExecutionContextAllocationStrategy",
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
    *("BuilderFlag.REQUIRE_USER_ALLOCATION", "is_stream_capturable"),
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
            if parts[1] in ("__name__", "__version__"):
                continue
            if parts[0] == "trt":
                yield "", ".".join(parts[1:])
            elif kind and (kind, parts[1]) not in OTHER:
                yield kind, parts[1]


def used_names():
    """(class, last part) of what `used` finds and the other versions must have too."""
    for kind, name in used():
        if kind not in RTX_ONLY and name not in RTX_NAMES:
            yield kind, name.split(".")[-1]
