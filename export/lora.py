"""LoRA files: small changes to a checkpoint's weights, added before it is exported.

Knows the key layouts of kohya's scripts (`lora_unet_..`, `lora_te_..`) and of PEFT and the
reference library (`unet.` and `text_encoder.` with `lora_A`, `lora_B`, `lora.down`, `lora.up`),
linear layers and convolutions, LoCon's middle factor included. Hu et al. 2021 (arXiv:2106.09685),
eq. 3.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sdrt.errors import CheckpointError, UsageError

MOST_WEIGHT = 10.0
PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "unet": "unet",
    "text_encoder": "text_encoder",
}
KINDS = {
    "lora_down": "down",
    "lora_A": "down",
    "lora.down": "down",
    "lora_up": "up",
    "lora_B": "up",
    "lora.up": "up",
    "lora_mid": "mid",
}
TAIL = re.compile(
    r"(?:\.(?P<kind>lora_down|lora_up|lora_mid|lora_A|lora_B|lora\.down|lora\.up)"
    r"(?:\.default)?\.weight|_lora\.(?P<old>down|up)\.weight|\.(?P<alpha>alpha))$"
)


@dataclass(slots=True)
class Change:
    """What a file does to one weight: `alpha / rank * up @ mid @ down`."""

    key: str
    factors: dict[str, Tensor] = field(default_factory=dict)

    def delta(self, shape: torch.Size) -> Tensor:
        """The change, float32, in the weight's shape; raises CheckpointError if it misfits."""
        if not {"down", "up"} <= set(self.factors):
            raise CheckpointError(f"the LoRA's {self.key} lacks its down or its up factor")
        down, up = (self.factors[name].float() for name in ("down", "up"))
        rank = down.shape[0]
        scale = float(self.factors["alpha"]) / rank if "alpha" in self.factors else 1.0
        try:
            if "mid" in self.factors:
                mid = self.factors["mid"].float()
                product = torch.einsum("or,rshw,si->oihw", up.flatten(1), mid, down.flatten(1))
            else:
                product = up.flatten(1) @ down.flatten(1)
            return scale * product.reshape(shape)
        except RuntimeError:
            raise CheckpointError(
                f"the LoRA's {self.key} is {list(up.shape)} by {list(down.shape)}, the weight "
                f"{list(shape)}; it was made for another architecture"
            ) from None


def parse_lora(text: str) -> tuple[Path, float]:
    """`"FILE"` or `"FILE:0.8"` -> the file and its weight; raises UsageError."""
    name, colon, number = text.rpartition(":")
    try:
        path, weight = (name, float(number)) if colon else (text, 1.0)
    except ValueError:
        path, weight = text, 1.0
    if not -MOST_WEIGHT <= weight <= MOST_WEIGHT:
        raise UsageError(f"LoRA weight {weight:g}; expected -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}")
    return Path(path).expanduser(), weight


def changes_from_tensors(tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], Change]:
    """The changes of a file by part and module, names with underscores for dots.

    Raises CheckpointError for a key of no known layout, naming it.
    """
    changes: dict[tuple[str, str], Change] = {}
    for key, tensor in tensors.items():
        tail = TAIL.search(key)
        head = key[: tail.start()] if tail else ""
        prefix, _, module = head.partition(".")
        for start in ("lora_unet", "lora_te1", "lora_te"):
            if head.startswith(f"{start}_"):
                prefix, module = start, head[len(start) + 1 :]
                break
        if tail is None or prefix not in PARTS or not module:
            raise CheckpointError(
                f"the LoRA's key {key!r} is of no known layout; expected kohya's lora_unet_.. and "
                "lora_te_.., or PEFT's unet. and text_encoder."
            )
        kind = tail["alpha"] or tail["old"] or KINDS[tail["kind"]]
        module = module.replace(".processor", "").replace(".", "_").removeprefix("text_model_")
        place = PARTS[prefix], module
        changes.setdefault(place, Change(head)).factors[kind] = tensor
    return changes


@dataclass(frozen=True, slots=True)
class Lora:
    """A file's name, its changes by part and module, and how much of them is added."""

    name: str
    changes: Mapping[tuple[str, str], Change]
    weight: float


def fused(part: str, weights: dict[str, Tensor], loras: Sequence[Lora]) -> dict[str, Tensor]:
    """The weights of a part with every file's changes added.

    Raises CheckpointError for a module that the part does not have, naming the first and counting
    the others.
    """
    if not loras:
        return weights
    names = {
        name.removesuffix(".weight").removeprefix("text_model.").replace(".", "_"): name
        for name in weights
        if name.endswith(".weight")
    }
    made = dict(weights)
    for lora in loras:
        own = {module: change for (of, module), change in lora.changes.items() if of == part}
        missing = [change.key for module, change in own.items() if module not in names]
        if missing:
            raise CheckpointError(
                f"{lora.name}: this model's {part} has no {missing[0]} (and {len(missing) - 1} "
                "others); the LoRA was made for another architecture"
            )
        for module, change in own.items():
            name = names[module]
            made[name] = made[name].float() + lora.weight * change.delta(made[name].shape)
    return made
