"""Since which version TensorRT's bindings have the names that `engine/` uses, for the tests.

    pip download --no-deps --dest WHEELS tensorrt-cu12-bindings==10.3.0  # and other versions
    python tools/tensorrt_names.py WHEELS/*.whl

The wheels import only where TensorRT's own libraries are, so that the names are looked up among
the strings of the compiled module: a name of another class counts as well. Writes
`tests/engine/tensorrt/names.json`.
"""

import json
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STORED = ROOT / "tests" / "engine" / "tensorrt" / "names.json"
# For work on refitting single weights.
OTHERS = {"REFIT_INDIVIDUAL", "TensorLocation", "Weights", "mark_weights_refittable"}
OTHERS |= {"DEVICE", "HOST", "get_all_weights", "refit_cuda_engine_async", "set_named_weights"}


def names_in(wheel: Path, expected: set[str]) -> set[str]:
    """Those of the names that the module has as whole strings, or as the end of longer ones, which
    is how a linker stores them.
    """
    with zipfile.ZipFile(wheel) as archive:
        binary = next(name for name in archive.namelist() if name.endswith("/tensorrt.so"))
        content = archive.read(binary)
        content += b"".join(
            archive.read(name) for name in archive.namelist() if name.endswith("/__init__.py")
        )
    return {name for name in expected if name.encode() + b"\0" in content}


def parse_version(text: str) -> tuple[int, ...]:
    """Of the numbers alone: 10.2.0.post1 is 10.2.0."""
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from tensorrt_usage import used_names

    expected = {name for _, name in used_names()} | OTHERS
    wheels = {path.name.split("-")[1]: path for path in map(Path, sys.argv[1:])}
    versions = sorted(wheels, key=parse_version)
    present = {version: names_in(wheels[version], expected) for version in versions}
    since = {}
    for name in sorted(expected):
        lacking = [version for version in versions if name not in present[version]]
        later = versions[versions.index(lacking[-1]) + 1 :] if lacking else versions
        since[name] = later[0] if later else None  # None: the newest lacks it
    table = {"versions": versions, "since": since}
    STORED.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
