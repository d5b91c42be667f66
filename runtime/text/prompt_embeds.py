"""Embeddings that a caller passes instead of prompts.

Knows their shapes; not what they mean.
"""

import numpy as np

from sdrt.errors import UsageError
from sdrt.runtime.options import GenerationOptions

Embeddings = dict[str, np.ndarray]  # `context`, and `pooled` from models that have it


def read_embeddings(options: GenerationOptions, prefix: str, has_pooled: bool) -> Embeddings:
    """Embeddings instead of a prompt, for all images; prefix: "" or "negative_"."""
    name, pooled_name = f"{prefix}prompt_embeds", f"{prefix}pooled_prompt_embeds"
    embeddings = {"context": _check_embeddings(name, getattr(options, name), "tokens, width")}
    if has_pooled:
        if getattr(options, pooled_name) is None:
            raise UsageError(
                f"{name} without {pooled_name}", hint="pass both: this model reads both"
            )
        pooled = _check_embeddings(pooled_name, getattr(options, pooled_name), "width")
        embeddings["pooled"] = pooled
    return embeddings


def _check_embeddings(name: str, embeddings: np.ndarray, axes: str) -> np.ndarray:
    array = np.asarray(embeddings, np.float32)
    if array.ndim != 2 + axes.count(",") or not len(array) or not np.isfinite(array).all():
        raise UsageError(
            f"{name} are {list(array.shape)}; expected [images or 1, {axes}] of finite numbers"
        )
    return array


def select_row(embeddings: Embeddings, index: int) -> Embeddings:
    """One prompt's embeddings; one for all is enough."""
    for name, value in embeddings.items():
        if index >= len(value) > 1:
            raise UsageError(
                f"{len(value)} embeddings ({name}) for image {index + 1}",
                hint="pass one for each prompt, or one for all",
            )
    return {name: value[min(index, len(value) - 1)] for name, value in embeddings.items()}
