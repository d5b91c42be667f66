"""Lays the package out as it is installed, with links, for tools that do not follow its mapping.

python tools/link_package.py FOLDER     # makes FOLDER/sdrt
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    mapping = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-dir"
    ]
    target = Path(sys.argv[1]) / "sdrt"
    target.mkdir(parents=True)
    for package, folder in mapping.items():
        if package == "sdrt":
            for path in (root / folder).iterdir():
                (target / path.name).symlink_to(path)
        else:
            (target / package.removeprefix("sdrt.")).symlink_to(root / folder)


if __name__ == "__main__":
    main()
