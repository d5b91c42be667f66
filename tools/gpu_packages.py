"""Prints the versions of what a visit to a GPU uses, and fails where something needed is missing.

python tools/gpu_packages.py
"""

import importlib
import importlib.metadata
import json
import platform
import sys

NEEDED = {
    "filelock": "lock_descriptor",
    "numpy": "",
    "onnx": "",
    "onnxscript": "",
    "PIL": "",
    "psutil": "",
    "pytest": "",
    "safetensors": "",
    "torch": "",
    "tqdm": "",
    "transformers": "",
}
OPTIONAL = ("cuda.bindings", "diffusers", "onnxruntime", "tensorrt", "tensorrt_rtx", "triton")


def find_missing() -> list[str]:
    """What a visit cannot do without, and what of it is too old."""
    missing = []
    for module, attribute in NEEDED.items():
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{module} ({error})")
            continue
        if attribute and not hasattr(imported, attribute):
            missing.append(f"{module} ({imported.__version__} has no {attribute})")
    return missing


def main() -> None:
    versions = {"python": platform.python_version()}
    versions |= {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"] and distribution.metadata["Name"].split("-")[0] != "types"
    }
    print(json.dumps(versions, indent=1, sort_keys=True))
    for module in OPTIONAL:
        try:
            importlib.import_module(module)
        except Exception as error:  # of a library that does not load, too
            print(f"optional {module}: {type(error).__name__}: {error}".split("\n")[0])
    if missing := find_missing():
        sys.exit(f"missing: {', '.join(missing)}; run `tools/gpu_visit.sh pack` with network")
    print("nothing is missing")


if __name__ == "__main__":
    main()
