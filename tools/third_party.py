"""What an installed sdrt stands on: THIRD_PARTY.md, and the bill of materials next to a wheel.

    python tools/third_party.py                                   # writes THIRD_PARTY.md
    python tools/third_party.py --wheel dist/sdrt-0.1.0-py3-none-any.whl    # writes .cdx.json

Knows the metadata of installed packages and constraints.txt. The extras `gpu`, `rtx` and `ray` are
not followed: the first two bring NVIDIA's libraries under NVIDIA's own terms, the third Ray
(Apache-2.0) with what it brings.
"""

import argparse
import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageMetadata, metadata, requires
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "THIRD_PARTY.md"
EXTRAS = ("", "cpu", "openvino", "serve", "s3", "otel", "build")
PERMISSIVE = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CNRI-Python", "ISC"),
    *("MIT", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib", "CC0-1.0"),
    "MPL-2.0",  # of whole files, which are used as they come
}
# What metadata says in other words than SPDX's, or where two licences share a name.
SAID = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License v2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


@dataclass(slots=True)
class Package:
    """One package that an extra brings: what it is, by which extras, and what it wants itself."""

    name: str
    licence: str
    home: str
    extras: list[str] = field(default_factory=list)
    wants: set[str] = field(default_factory=set)


def packages() -> dict[str, Package]:
    """All that sdrt's extras bring, by canonical name; `sdrt` itself is among them."""
    actual: dict[str, Package] = {}
    for extra in EXTRAS:
        for name, wants in _reached("sdrt", extra, {}).items():
            about = metadata(name)
            known = actual.setdefault(
                name, Package(about["Name"], licence_of(about), home_of(about))
            )
            known.extras.append(extra)
            known.wants |= wants
    return actual


def _reached(name: str, extra: str, seen: dict[str, set[str]]) -> dict[str, set[str]]:
    """The packages on the way from one, each with those that it wants itself."""
    wants = {(canonicalize_name(need.name), *need.extras) for need in needs(name, extra)}
    known = seen.setdefault(name, set())
    fresh = {other for other, *_ in wants} - known
    known |= fresh
    for other, *extras in sorted(wants):
        if other in fresh:
            for item in extras or [""]:
                _reached(other, item, seen)
    return seen


def needs(name: str, extra: str) -> Iterator[Requirement]:
    """The requirements of an installed package that hold here."""
    for text in requires(name) or []:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            yield need


def licence_of(about: PackageMetadata) -> str:
    """An SPDX expression, or the words found, which no list of licences has."""
    classifiers = about.get_all("Classifier") or []
    said = [about["License-Expression"], *(about["License"] or "").splitlines()[:1]]
    said += [line.split(" :: ")[-1] for line in classifiers if line.startswith("License ::")]
    for words in filter(None, said):
        try:
            return str(canonicalize_license_expression(SAID.get(words, words)))
        except InvalidLicenseExpression:
            continue
    return " / ".join(filter(None, said)) or "unknown"


def permitted(licence: str) -> bool:
    """Whether an SPDX expression asks for nothing but notices, whichever way it is read."""
    names = re.split(r"\s+(?:AND|OR)\s+|[()]", licence)
    return all(name.split(" WITH ")[0] in PERMISSIVE for name in names if name)


def home_of(about: PackageMetadata) -> str:
    """Where a package says that it lives."""
    links = dict(line.split(", ", 1) for line in about.get_all("Project-URL") or [])
    named = {label.casefold(): link for label, link in links.items()}
    for label in ("source", "source code", "repository", "homepage"):
        if label in named:
            return named[label]
    return about["Home-page"] or next(iter(links.values()), "")


def table() -> str:
    """THIRD_PARTY.md."""
    lines = [
        "# What sdrt stands on",
        "",
        "Packages that an installation brings, with their licences. Nothing of theirs is in the",
        "wheel. Written by `python tools/third_party.py`; a test holds it to what is installed.",
        "The extras `gpu` and `rtx` bring NVIDIA's libraries under NVIDIA's own terms, `ray` Ray",
        "(Apache-2.0) and what it wants; they are not listed.",
        "",
        "| package | licence | with |",
        "|---|---|---|",
    ]
    for name, item in sorted(packages().items()):
        if name != "sdrt":
            brought = "always" if "" in item.extras else ", ".join(item.extras)
            title = f"[{item.name}]({item.home})" if item.home else item.name
            lines.append(f"| {title} | {item.licence} | {brought} |")
    return "\n".join(lines) + "\n"


def locked() -> dict[str, str]:
    """Canonical name -> version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def sbom(wheel: Path) -> dict[str, Any]:
    """A CycloneDX 1.6 bill of materials: the wheel, and the locked versions of what it wants."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    version = wheel.name.split("-")[1]
    actual, versions = packages(), {**locked(), "sdrt": version}
    refs = {name: f"pkg:pypi/{name}@{versions[name]}" for name in actual}

    def component(name: str) -> dict[str, Any]:
        item = actual[name]
        scope = "required" if "" in item.extras else "optional"
        about = {"type": "library", "name": item.name, "version": versions[name]}
        licences = [{"expression": item.licence}]
        return {
            **about,
            "bom-ref": refs[name],
            "purl": refs[name],
            "scope": scope,
            "licenses": licences,
        }

    own = component("sdrt") | {"hashes": [{"alg": "SHA-256", "content": digest}]}
    own.pop("scope")
    others = sorted(set(actual) - {"sdrt"})
    depends = [
        {"ref": refs[name], "dependsOn": sorted(refs[want] for want in actual[name].wants)}
        for name in sorted(actual)
    ]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {"component": own},
        "components": [component(name) for name in others],
        "dependencies": depends,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--wheel", type=Path)
    args = parser.parse_args()
    if args.wheel:
        neighbour = args.wheel.with_suffix(".cdx.json")
        neighbour.write_text(json.dumps(sbom(args.wheel), indent=2) + "\n")
    else:
        TABLE.write_text(table())


if __name__ == "__main__":
    main()
