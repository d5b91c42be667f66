"""Where bundles are: those built here, those embedded in the package, and finding one by name.

Knows folders; not what is in a manifest.
"""

import contextlib
import difflib
import os
from pathlib import Path

from sdrt.atomic_files import locked, restore_backup, sibling
from sdrt.errors import BundleError

from .embedded import embedded_folder, embedded_names, materialize
from .manifest import MANIFEST


def home() -> Path:
    """Where bundles live: `$SDRT_HOME`, else `sdrt` in the user's cache folder."""
    if folder := os.environ.get("SDRT_HOME"):
        return Path(folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "sdrt"


def bundles_folder() -> Path:
    return home() / "bundles"


def list_bundles() -> list[Path]:
    """Folders of all bundles built here, newest first, then the embedded ones that were used."""
    for old in bundles_folder().glob(".*.old"):
        _finish_replacement(old.with_name(old.name[1 : -len(".old")]))
    # What begins with a dot is not finished.
    built = [path.parent for path in bundles_folder().glob(f"[!.]*/{MANIFEST}")]
    built.sort(key=lambda folder: (folder / MANIFEST).stat().st_mtime, reverse=True)
    embedded = [embedded_folder(name, home()) for name in embedded_names()]
    return built + [folder for folder in embedded if folder.is_dir()]


def find_bundle(name: str | os.PathLike[str] | None) -> Path:
    """The folder of the bundle called `name`, or at that path; None for the newest, or the embedded
    one where none was built. Raises BundleError.
    """
    if name is None:
        if found := list_bundles():
            return found[0]
        for embedded in embedded_names():
            return materialize(embedded, home())
        raise BundleError("no bundle has been built yet", hint="run `sdrt build --model shapes`")
    for folder in (Path(name).expanduser(), bundles_folder() / name):
        _finish_replacement(folder)
        try:
            if (folder / MANIFEST).is_file():
                return folder
        except OSError as error:
            raise BundleError(f"{folder} cannot be read: {error.strerror}") from error
    if name in embedded_names():
        return materialize(str(name), home())
    names = sorted({folder.stem for folder in list_bundles()})
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"type: sdrt build --model {name}"
    raise BundleError(
        f"no bundle called {str(name)!r}: neither a folder with {MANIFEST} nor one of those built "
        f"here ({', '.join(names) or 'none'}); {hint}"
    )


def _finish_replacement(folder: Path) -> None:
    """Where a build that replaced a bundle was cut off between two renames, end that."""
    with contextlib.suppress(OSError):
        if folder.name and not folder.exists() and sibling(folder, "old").exists():
            with locked(folder):
                restore_backup(folder)
