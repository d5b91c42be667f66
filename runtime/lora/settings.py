"""What PEFT keeps of its configuration with a LoRA file: alphas, ranks, and how they scale.

Knows PEFT's settings, of which diffusers writes a copy for each part into the file's metadata; not
the names of tensors, nor what is computed from them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdrt.errors import CheckpointError
from sdrt.json_validation import Reader, boolean, json_object, mapping, number, shorten, text

from .deltas import MAX_ALPHA, Change
from .patterns import Patterns

METADATA, FILE = "lora_adapter_metadata", "adapter_config.json"
MAX_PATTERNS = 10_000
ALPHA = number(-MAX_ALPHA, MAX_ALPHA)
RANK = number(1, MAX_ALPHA)
NAME = text(r".*", "a name")
HARMLESS = (None, True, False, "gaussian", "eva", "orthogonal")  # leave the model's weights alone
UNSUPPORTED = (
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"),
    *("kasa_config", "monteclora_config", "velora_config", "trainable_token_indices"),
)
LayerKey = tuple[str, str]


def add_settings(
    changes: Mapping[LayerKey, Change],
    modules: Mapping[LayerKey, str],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
) -> None:
    """Give changes the alphas and ranks that their file's settings have for them.

    Args:
        changes: by part and module; those with an alpha of their own keep it.
        modules: the names that PEFT has for them, with dots.
        metadata: of the file.
        config: PEFT's own file of settings, which are for every part.

    Raises:
        CheckpointError: a setting is not what it should be, or changes the result and is not
            supported.
    """
    try:
        known = json_object(metadata.get(METADATA, "{}").encode())
        for part in {part for part, _ in changes}:
            start = f"{part}."
            own = {k.removeprefix(start): v for k, v in known.items() if k.startswith(start)}
            _add_part(part, own if config is None else config, changes, modules)
    except ValueError as error:
        raise CheckpointError(f"its {METADATA if config is None else FILE}: {error}") from error


def _add_part(
    part: str,
    own: Mapping[str, Any],
    changes: Mapping[LayerKey, Change],
    modules: Mapping[LayerKey, str],
) -> None:
    _check_settings(own)
    alpha = own.get("lora_alpha", own.get("alpha"))  # the latter for LoHa and LoKr
    alpha = None if alpha is None else ALPHA(alpha, f"an alpha of {part}")
    rank = None if own.get("r") is None else RANK(own["r"], f"a rank of {part}")
    alphas, ranks = _patterns(own, "alpha_pattern", ALPHA), _patterns(own, "rank_pattern", RANK)
    stabilised = boolean(own.get("use_rslora") or False, "use_rslora")
    for (of, module), change in changes.items():
        if of != part or "alpha" in change.factors:
            continue
        name = modules[of, module]
        values = alphas.get(name, alpha)
        if values is not None:
            change.factors["alpha"] = np.asarray(values, np.float32)
        change.rank, change.rank_stabilised = ranks.get(name, rank), stabilised


def _patterns(own: Mapping[str, Any], name: str, value: Reader[float]) -> Patterns:
    return Patterns(mapping(value, NAME, MAX_PATTERNS)(own.get(name) or {}, name))


def _check_settings(own: Mapping[str, Any]) -> None:
    """Raise ValueError for settings by which PEFT would compute something else."""
    if own.get("init_lora_weights") not in HARMLESS:
        raise ValueError(
            f"init_lora_weights is {shorten(own['init_lora_weights'])}, by which PEFT changes "
            "the model's own weights too; save the file again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if values := [name for name in UNSUPPORTED if own.get(name)]:
        raise ValueError(f"{', '.join(values)} is not supported")
