"""Which LoRA files an image is made with: those of its prompt's tags, and those given next to it.

Knows names and weights, not what the files hold.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdrt.errors import UsageError
from sdrt.runtime.options import GenerationOptions
from sdrt.runtime.parsing import parse_lora_weights
from sdrt.runtime.requests import Request

from .names import find_lora_by_name
from .tags import LITERAL, MAX_LORAS, LoraTag, LoraWeight, check_untagged, parse_tags, parse_weight

# Files with their weights, in the order in which they are added, each once and none of no weight.
LoraSet = tuple[tuple[Path, LoraWeight], ...]
Named = Mapping[Any, float | LoraWeight]  # by `str` or path


def merge_loras(*parts: Iterable[tuple[Path, LoraWeight]]) -> LoraSet:
    """All of these together: the weights of a file that comes more than once add up."""
    total: dict[Path, LoraWeight] = {}
    for path, weight in (entry for part in parts for entry in part):
        place = path.absolute()
        total[place] = total.get(place, LoraWeight(0.0, 0.0)) + weight
    return tuple((path, weight) for path, weight in total.items() if weight != LoraWeight(0.0, 0.0))


def check_lora_set(loras: LoraSet) -> LoraSet:
    """The set; raises UsageError for too many files, and weights outside -10 to 10."""
    if len(loras) > MAX_LORAS:
        raise UsageError(f"{len(loras)} LoRAs for one image; expected at most {MAX_LORAS}")
    for _, weight in loras:
        parse_weight(weight)
    return loras


def format_tags(loras: LoraSet) -> str:
    """As other tools write it into a prompt: ` <lora:name:0.8>`, and so on."""
    return "".join(f" {LoraTag(path.stem, weight)}" for path, weight in loras)


def group_by_lora_set(
    requests: Sequence[Request],
    options: GenerationOptions,
    base: LoraSet,
    named: Named | None = None,
) -> dict[LoraSet | None, list[Request]]:
    """The requests of a call by the LoRA files that they are made with.

    Args:
        requests: Of one call. With `weighting` off their tags are text.
        options: The call's.
        base: What the pipeline carries for requests that name no files; tags add to it.
        named: Files for all of them next to the tags: a `str` is a name in the folder `loras`, a
            path is a file's.

    Returns:
        Sets without `base`, each with its requests, whose prompts have no tags any more and whose
        `recorded_prompt` is the text for the image's file; by None those that name no files.

    Raises:
        UsageError: For a tag that is not understood, an unknown name, a weight out of range.
    """
    weights = parse_lora_weights(named or {})
    shared = [(_file(name), weight) for name, weight in weights.items()]
    tail = "".join(f" {LoraTag(_name(name), weight)}" for name, weight in weights.items())
    read: dict[str, tuple[str, LoraSet]] = {}
    groups: dict[LoraSet | None, list[Request]] = {}
    for request in requests:
        prompt = request.prompt
        if prompt not in read:
            text, tags = parse_tags(prompt) if options.weighting else (prompt, ())
            own = [(find_lora_by_name(tag.name), tag.weight) for tag in tags]
            check_lora_set(merge_loras(base, own, shared))
            read[prompt] = text, merge_loras(own, shared)
        text, loras = read[prompt]
        if text + tail == prompt:
            groups.setdefault(None, []).append(request)
            continue
        written = prompt + tail + format_tags(base) if options.weighting else ""
        groups.setdefault(loras, []).append(replace(request, prompt=text, recorded_prompt=written))
    return groups


def refuse_tags(requests: Iterable[Request], options: GenerationOptions) -> None:
    """Raise UsageError for a LoRA tag in a prompt, for a call that must not change the weights
    which other calls at the same time are made with.
    """
    for prompt in {request.prompt for request in requests} if options.weighting else ():
        for tag in parse_tags(prompt)[1]:
            raise UsageError(
                f"A call does not apply the tag {tag} of its prompt, as other calls may run at the "
                "same time",
                hint=f"call pipe.set_lora({{{tag.name!r}: {tag.weight.unet:g}}}) first and leave "
                f"the tag out; {LITERAL}",
            )


def refuse_negative_tags(requests: Iterable[Request], options: GenerationOptions) -> None:
    """Raise UsageError for a LoRA tag in a negative prompt, where no tool applies one."""
    for prompt in {entry.negative_prompt for entry in requests} if options.weighting else ():
        check_untagged(prompt, "negative prompt", "put it into the prompt")


def _file(name: str | os.PathLike[str]) -> Path:
    return find_lora_by_name(name) if isinstance(name, str) else Path(name)


def _name(name: str | os.PathLike[str]) -> str:
    return name if isinstance(name, str) else Path(name).stem
