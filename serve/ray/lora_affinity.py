"""Prefers replicas whose weights carry a request's LoRA files, so that they need not be switched.

Knows the fields of requests and which replica was sent what; not Ray, nor the files.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdrt.bundle.manifest import LORA_PARTS, Manifest
from sdrt.errors import UsageError
from sdrt.runtime.lora.tags import LoraTag, parse_tags, parse_weight

PATHS = (
    *("/v1/images/generations", "/v1/images/edits"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img"),
)


def switches_weights(manifest: Manifest | None) -> bool:
    """Whether a model's weights are changed for other LoRA files, as they are in bundles without
    `--lora-rank`.
    """
    return manifest is None or LORA_PARTS["unet"] not in manifest.components


def read_lora_tags(path: str, fields: Mapping[str, Any]) -> str | None:
    """The LoRA files that a request names, equal for equal ones and "" for none. None where it
    generates no image, or is to be refused.
    """
    if path not in PATHS:
        return None
    try:
        tags = parse_tags(fields.get("prompt") or "")[1]
        named = fields.get("loras") or {}
        own = [LoraTag(name, parse_weight(weight)) for name, weight in named.items()]
    except (AttributeError, TypeError, UsageError):  # the replica responds with the error
        return None
    return "".join(sorted(map(str, (*tags, *own))))


@dataclass(slots=True)
class LoraAffinity:
    """The LoRA files of the last request that each replica was sent, by model.

    Attributes:
        slots: Concurrent images of a replica's engine.
    """

    slots: int
    _last: dict[tuple[Hashable, str], str] = field(default_factory=dict)

    def record(self, replica: Hashable, model: str, tags: str) -> None:
        """A replica was sent a request with these files."""
        self._last[replica, model] = tags

    def forget_others(self, replicas: Iterable[Hashable]) -> None:
        """Forget all replicas but these."""
        current = set(replicas)
        self._last = {key: tags for key, tags in self._last.items() if key[0] in current}

    def find_preferred(
        self, ongoing: Mapping[Hashable, int], model: str, tags: str
    ) -> list[Hashable]:
        """Those of the replicas, by their ongoing requests, that have a slot and whose last request
        for the model had these files; before its first, a replica carries none.
        """
        return [
            replica
            for replica, count in ongoing.items()
            if count < self.slots and self._last.get((replica, model), "") == tags
        ]
