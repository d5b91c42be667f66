"""LoRA files by name: those in the folder `loras` of sdrt's home, and in its sub-folders.

Names come from prompts and over a network. They are compared with the names of the files that are
there, and never become part of a path; a link that leads out of the folder is not listed.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from sdrt.bundle.safetensors import Tensors
from sdrt.bundle.store import home
from sdrt.errors import SdrtError, UsageError

SUFFIX = ".safetensors"
PICKLES = (".pt", ".ckpt", ".bin", ".pth", ".pkl")
ALIAS = "ss_output_name"  # the name that kohya's trainer wrote into the file
NO_PICKLES = f"ask its author for a {SUFFIX} file, or convert it where that is safe"
MAX_NAMED = 5  # names that a message lists
MAX_COMPARED = 100  # letters of a name that near ones are looked for


def loras_folder() -> Path:
    return (home() / "loras").absolute()


def list_loras() -> dict[str, Path]:
    """The LoRA files by name, sorted: the path within the folder without its suffix.

    Source: the web UI lists sub-folders too (its extension `Lora`, `list_available_networks`).
    """
    return {name: path for name, path in _files() if path.suffix.lower() == SUFFIX}


def names_outside_folder(files: Sequence[Path]) -> list[str]:
    """The names of those files that are not in the folder, so that they are not found by name."""
    listed = set(list_loras().values()) if files else set()
    return [file.stem for file in files if file not in listed]


def find_lora_by_name(name: str) -> Path:
    """The file of a name: its path within the folder (`people/anna`), its stem where only one file
    has it (`anna`), or the name in its metadata; as written, else without regard to case.

    Raises:
        UsageError: If there is none, with the nearest names, or if more than one file has the name.
    """
    listed = list_loras()
    for case in (str, str.casefold):
        for names_of in (_path_names, _stems, _aliases):
            hits = [file for file, known in names_of(listed) if case(known) == case(name)]
            if len(hits) == 1:
                return listed[hits[0]]
            if hits:
                raise UsageError(
                    f"There are several LoRAs named {name!r}", hint=f"name one: {_some(hits)}"
                )
    if pickles := [path.name for _, path in _files() if path.stem == name]:
        raise UsageError(f"{pickles[0]} is a pickle, which is refused", hint=NO_PICKLES)
    raise UsageError(
        f"There is no LoRA named {name[:MAX_COMPARED]!r} in {_place()}", hint=near(name)
    )


def near(name: str) -> str:
    """What to say of the names that there are, to whoever gave another."""
    listed = list_loras()
    if not listed:
        return f"put {SUFFIX} files into that folder, or pass a file's path"
    names = {known.casefold(): file for file in listed for known in (file, listed[file].stem)}
    folded = name[:MAX_COMPARED].casefold()
    matches = difflib.get_close_matches(folded, names, n=MAX_NAMED, cutoff=0.5)
    if matches:
        return f"did you mean {_some(list(dict.fromkeys(names[match] for match in matches)))}?"
    return f"there are {_some(list(listed))}" if len(listed) > 1 else f"there is {_some(listed)}"


def _some(names: Mapping[str, Path] | list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(list(names)[:MAX_NAMED]) + more


def _place() -> str:
    """Where files are looked for, without revealing this machine's paths to clients."""
    if os.environ.get("SDRT_HOME"):
        return "$SDRT_HOME/loras"
    return f"{'$XDG_CACHE_HOME' if os.environ.get('XDG_CACHE_HOME') else '~/.cache'}/sdrt/loras"


def _files() -> Iterator[tuple[str, Path]]:
    """All files of the folder that might be LoRAs, sorted by name, none outside of it."""
    folder = loras_folder()
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = Path(parent, file)
            known = path.suffix.lower() in (SUFFIX, *PICKLES) and path.is_file()
            if known and path.resolve().is_relative_to(inside):
                yield path.relative_to(folder).with_suffix("").as_posix(), path


Names = Iterator[tuple[str, str]]


def _path_names(listed: Mapping[str, Path]) -> Names:
    return ((name, name) for name in listed)


def _stems(listed: Mapping[str, Path]) -> Names:
    return ((name, path.stem) for name, path in listed.items())


def _aliases(listed: Mapping[str, Path]) -> Names:
    return ((name, read_alias(path)) for name, path in listed.items())


def read_alias(path: Path) -> str:
    """The name in a file's metadata; its stem where it has none or cannot be read."""
    stat = path.stat()
    return _alias(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(4096)
def _alias(path: Path, modified: int, size: int) -> str:
    try:
        return Tensors(path).metadata.get(ALIAS) or path.stem
    except SdrtError:
        return path.stem
