"""Fetching from the hub: only the files that a build needs, chosen by their names.

Knows the hub's client and the names of files; not what is in them. The client reads HF_HOME,
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, shows progress on a terminal, goes on where a connection
was cut, and keeps whole files in its cache.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sdrt.errors import CheckpointError

from .weights import PICKLES, TO_CONVERT, weight_names

log = logging.getLogger("sdrt.build")
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
FOLDERS = ("scheduler/", "tokenizer/", "tokenizer_2/")  # of small files, all of which are fetched
AT_THE_ROOT = ("model_index.json", "scheduler_config.json")


def fetched(repository: str, parts: Sequence[str] = PARTS, revision: str | None = None) -> Path:
    """The folder of the hub's cache with what a build needs of a repository.

    revision: a branch, tag or commit; None is the main branch.
    Raises CheckpointError: gated, private, no such repository or revision, none of the parts, only
    pickles, no network and nothing in the cache.
    """
    from huggingface_hub import constants, snapshot_download

    with _in_words(repository, revision):
        sizes = {} if constants.HF_HUB_OFFLINE else _sizes(repository, revision)
        if not sizes:
            folder = snapshot_download(
                repository, revision=revision, allow_patterns=[], local_files_only=True
            )
            return Path(folder)
        names = needed_names(sizes, parts)
        log.info(
            "fetching %d of %d files of %s, %.1f of %.1f MB, but what the hub's cache holds",
            len(names),
            len(sizes),
            repository,
            sum(sizes[name] for name in names) / 1e6,
            sum(sizes.values()) / 1e6,
        )
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names))


def fetch_single_file(repository: str, revision: str | None = None) -> Path:
    """The only safetensors file of a repository.

    Raises:
        CheckpointError: As `fetched`; also where there are several.
    """
    from huggingface_hub import constants, snapshot_download

    with _in_words(repository, revision):
        offline = constants.HF_HUB_OFFLINE
        names = () if offline else _sizes(repository, revision)
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[name for name in names if name.endswith(".safetensors")],
                local_files_only=not names,
            )
        )
        files = sorted(folder.rglob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(f"it has {len(files)} .safetensors files; expected one")
        return files[0]


def _sizes(repository: str, revision: str | None) -> dict[str, int]:
    """Bytes of every file of a repository by name; none if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        log.warning("the hub is out of order (%s); going by its cache", error.response.status_code)
        return {}
    except Exception as error:  # of the client's HTTP library, which differs by version
        log.warning("the hub cannot be reached (%s); going by its cache", type(error).__name__)
        return {}
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}


def needed_names(names: Collection[str], parts: Sequence[str]) -> list[str]:
    """Of a repository's files those that a build reads; a repository of one part may have it at
    its root. Raises CheckpointError where no part is, or only as pickles.
    """
    small = (".json", ".txt")
    needed = [n for n in names if (n.startswith(FOLDERS) and n.endswith(small)) or n in AT_THE_ROOT]
    places = [f"{part}/" for part in parts if f"{part}/config.json" in names]
    if not places and "config.json" in names:
        places = [""]
    if not places:
        raise CheckpointError(_nothing_to_build(names, parts))
    for place in places:
        inside = [name.removeprefix(place) for name in names if name.startswith(place)]
        try:
            chosen = weight_names(inside)
        except CheckpointError as error:
            raise CheckpointError(f"{place or 'the repository'}: {error}") from error
        needed += [f"{place}{name}" for name in ("config.json", *chosen)]
    return sorted(needed)


def _nothing_to_build(names: Collection[str], parts: Sequence[str]) -> str:
    message = f"it has no {' or '.join(f'{part}/config.json' for part in parts)}"
    single = sorted(name for name in names if name.endswith(".safetensors"))
    if single:
        return f"{message}, but {single[0]}: download it and run `sdrt build --model FILE`"
    pickles = sorted(name for name in names if Path(name).suffix in PICKLES)
    return f"{message}, only {pickles[0]}, a pickle: {TO_CONVERT}" if pickles else message


@contextmanager
def _in_words(repository: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{repository}: {error}") from error
    except Exception as error:  # of the client and its HTTP library, which differs by version
        raise CheckpointError(_sentence(error, repository, revision)) from error


def _sentence(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{repository}"
    token = "set HF_TOKEN to a token of that account, or type hf auth login"
    if get_token():
        token = "see that the token in HF_TOKEN or of hf auth login is of that account"
    status = getattr(getattr(error, "response", None), "status_code", None)
    sentences: Mapping[type[Exception], str] = {
        errors.GatedRepoError: f"{repository} is gated ({status}): accept its terms at {page} with "
        f"your account, then {token}",
        errors.RepositoryNotFoundError: f"the hub has no {repository}, or it is private ({status}):"
        f" check the spelling; of a private one you need an account that may read it, then {token}",
        errors.RevisionNotFoundError: f"{repository} has no revision {revision!r}; its branches "
        f"and tags are listed at {page}",
    }
    for kind, sentence in sentences.items():
        if isinstance(error, kind):
            return sentence
    if status in (401, 403):
        return f"the hub refuses {repository} ({status}): open {page} with your account, {token}"
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    first = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return (
        f"cannot fetch {repository} from the hub{offline}: {first}. Complete files are cached, so "
        "run the command again. Without a network, copy the model's folder here, run `sdrt build "
        "--model FOLDER`, and set HF_HUB_OFFLINE=1 to use only what the hub's cache holds"
    )
