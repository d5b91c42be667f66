"""Which of the names that `engine/` uses of TensorRT a bindings wheel has, for the tests.

    python tools/tensorrt_names.py tensorrt_cu13_bindings-11.4.0.106-cp311-*.whl …

The wheels import only where TensorRT's own libraries are, so that their names are looked up among
the strings of the compiled module. Adds to `tests/engine/tensorrt/names.json`, by version.
"""

import json
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STORED = ROOT / "tests" / "engine" / "tensorrt" / "names.json"


def names_in(wheel: Path, expected: set[str]) -> list[str]:
    """Those of the names that the module has as whole strings, or as the end of longer ones, which
    is how a linker stores them.
    """
    with zipfile.ZipFile(wheel) as archive:
        binary = next(name for name in archive.namelist() if name.endswith("/tensorrt.so"))
        content = archive.read(binary)
        content += b"".join(
            archive.read(name) for name in archive.namelist() if name.endswith("/__init__.py")
        )
    return sorted(name for name in expected if name.encode() + b"\0" in content)


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from tensorrt_usage import used_names

    cached = json.loads(STORED.read_text()) if STORED.exists() else {}
    for wheel in map(Path, sys.argv[1:]):
        cached[wheel.name.split("-")[1]] = names_in(wheel, {name for _, name in used_names()})
    STORED.write_text(json.dumps(cached, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
