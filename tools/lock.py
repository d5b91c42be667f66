"""The versions that development is done with: writes constraints.txt below its first blank line.

    python tools/lock.py        # or make lock

Asks pip what the extras resolve to today and installs nothing. Knows pip's installation report,
not what the packages are for.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "constraints.txt"
EXTRAS = "build,cpu,serve,dev,ray,fuzz,audit,docs"
VOCABULARY = "open_clip_torch"  # for the file in it; what it asks for is not wanted
ABOVE = """\
# A plain or ranged torch pulls gigabytes of CUDA onto machines without a GPU.
torch==2.13.0
# The one that torch's build for CUDA wants: with another, pip finds no torch where an index has
# that build alone.
nvidia-cuda-nvrtc==13.0.88
# Later ones need Python 3.11.5, and Debian 12 has 3.11.2.
pymdown-extensions==12.3
"""
BELOW = f"""
# All else that [{EXTRAS}] comes to on Python 3.11 and Linux, as `make lock` found it.
# Without hashes: pip wants them for all or for none, and torch's wheels for the CPU are not the
# same file everywhere.
"""


def resolved(*requirements: str) -> dict[str, str]:
    """Name -> version of all that pip would install into an empty environment."""
    ask = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command = [sys.executable, "-m", "pip", *ask, "--constraint", "/dev/stdin", *requirements]
    done = subprocess.run(
        command, input=ABOVE, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    actual: dict[str, Any] = json.loads(done.stdout)
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in actual["install"]}


def main() -> None:
    versions = resolved("-e", f".[{EXTRAS}]") | resolved("--no-deps", VOCABULARY)
    chosen = re.findall(r"^([\w-]+)==", ABOVE, re.MULTILINE)
    names = sorted(versions.keys() - {"sdrt", "pip", *chosen}, key=str.lower)
    lines = [f"{name}=={versions[name]}" for name in names]
    LOCK.write_text(ABOVE + BELOW + "\n".join(lines) + "\n")
    print(f"{LOCK.name}: {len(lines) + len(chosen)} packages")


if __name__ == "__main__":
    main()
