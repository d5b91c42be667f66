"""Where bundles are: those built here, those embedded in the package, and finding one by name.

Knows folders; not what is in a manifest.
"""

import contextlib
import difflib
import os
from pathlib import Path

from sdrt.atomic_files import locked, restore_backup, sibling, write_atomic
from sdrt.errors import BundleError

from .embedded import embedded_folder, embedded_names, embedded_net_names, materialize
from .manifest import CONTROL_NETS, IP_ADAPTER, MANIFEST, UPSCALER


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
    names = (*embedded_names(), *embedded_net_names())
    embedded = [embedded_folder(name, home()) for name in names]
    return built + [folder for folder in embedded if folder.is_dir()]


def is_control_bundle(folder: Path) -> bool:
    """Whether a bundle's folder holds a ControlNet or T2I-Adapter, which makes no image alone."""
    return any((folder / name).is_dir() for name in CONTROL_NETS)


def generates_images(folder: Path) -> bool:
    """Whether a bundle's folder holds a model, not networks that others use."""
    others = (UPSCALER, IP_ADAPTER)
    return not is_control_bundle(folder) and not any((folder / name).is_dir() for name in others)


def bundle_name(folder: Path) -> str:
    """What a bundle's folder is called, by `find_bundle` too."""
    return folder.name.removesuffix(".bundle")


def default_name() -> str | None:
    """The bundle set by `sdrt use`, if there is one."""
    try:
        return _default_path().read_text("utf-8").strip() or None
    except (OSError, ValueError):
        return None


def set_default(name: str) -> None:
    """Make a bundle the default: what `find_bundle(None)` returns."""
    _default_path().parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_default_path(), f"{name}\n".encode())


def clear_default() -> None:
    _default_path().unlink(missing_ok=True)


def _default_path() -> Path:
    return home() / "default-bundle"


def find_bundle(name: str | os.PathLike[str] | None) -> Path:
    """The folder of a bundle.

    Args:
        name: A bundle's name or folder; None for the default: the one set by `sdrt use`, or the
            only one that was built, or the embedded one where none was.

    Raises:
        BundleError: There is no such bundle, or no default among several.
    """
    if name is None:
        return _find_default()
    for folder in (Path(name).expanduser(), bundles_folder() / name):
        _finish_replacement(folder)
        try:
            if (folder / MANIFEST).is_file():
                return folder
        except OSError as error:
            raise BundleError(f"{folder} cannot be read: {error.strerror}") from error
    if name in (*embedded_names(), *embedded_net_names()):
        return materialize(str(name), home())
    if Path(name).is_file():
        build = f"`sdrt build --model {name}` makes one of it"
        is_checkpoint = Path(name).suffix == ".safetensors"
        raise BundleError(
            f"{name} is a file; a bundle is a folder",
            hint=build if is_checkpoint else "`sdrt list` shows the bundles",
        )
    names = sorted({bundle_name(folder) for folder in list_bundles()})
    near = difflib.get_close_matches(str(name), names, n=1)
    raise BundleError(
        f"no bundle called {str(name)!r}; found {', '.join(names) or 'none'}",
        hint=f"did you mean {near[0]}?" if near else "`sdrt build` makes one of a model",
    )


def _find_default() -> Path:
    if chosen := default_name():
        return find_bundle(chosen)
    built = [
        folder
        for folder in list_bundles()
        if folder.parent == bundles_folder() and generates_images(folder)
    ]
    if len(built) > 1:
        names = ", ".join(sorted(bundle_name(folder) for folder in built))
        raise BundleError(
            f"there are {len(built)} bundles and none is the default",
            hint=f"run `sdrt use NAME`, or add --bundle NAME; NAME is one of {names}",
        )
    if built:
        return built[0]
    for embedded in embedded_names():
        return materialize(embedded, home())
    raise BundleError("no bundle has been built yet", hint="run `sdrt build --model shapes`")


def _finish_replacement(folder: Path) -> None:
    """Where a build that replaced a bundle was cut off between two renames, end that."""
    with contextlib.suppress(OSError):
        if folder.name and not folder.exists() and sibling(folder, "old").exists():
            with locked(folder):
                restore_backup(folder)
