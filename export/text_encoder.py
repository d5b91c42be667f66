"""CLIP's text models, as transformers 4 and 5 save them, and whether their tokenizers fit them.

Knows transformers' model, its configuration and its names of weights.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdrt.errors import CheckpointError
from sdrt.json_validation import shorten

from .checkpoint import Checkpoint
from .tokenizer import CheckpointTokenizer

log = logging.getLogger("sdrt.build")
KINDS = (None, "clip", "clip_text_model")
# What of a configuration the network reads; it has no dropout when it runs.
SHAPES = (
    *("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps", "projection_dim"),
    *("max_position_embeddings", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# What changes the result, with the values that do not.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": KINDS,
    "use_attention_mask": (None, False),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
}
# A whole CLIP model's, of which only the text half is read.
OTHER_HALF = ("vision_model.", "visual_projection.", "logit_scale")


def text_config(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """What of a text model's configuration shapes it; raises CheckpointError for what is not
    supported.
    """
    raw = checkpoint.config(part)
    if isinstance(inner := raw.get("text_config"), dict):  # of a whole CLIP model
        raw = {**raw, **inner}
    for key, values in FIXED.items():
        if raw.get(key) not in values:
            raise CheckpointError(
                f"{part}: {key}={shorten(raw[key])} is not supported; expected "
                f"{' or '.join(map(repr, values))}"
            )
    if unused := sorted(set(raw) - set(SHAPES) - set(FIXED)):
        log.debug("%s: these settings change nothing: %s", part, ", ".join(unused))
    return {key: raw[key] for key in SHAPES if key in raw}


def load_text_model(
    checkpoint: Checkpoint, part: str, config_values: Mapping[str, Any], class_name: str
) -> tuple[Any, dict[str, Tensor]]:
    """A text model of transformers without weights, and its weights under its own names.

    Args:
        checkpoint: where the weights are.
        part: `text_encoder` or `text_encoder_2`.
        config_values: as `text_config` returns them.
        class_name: of transformers' class.
    """
    import transformers

    config = transformers.CLIPTextConfig(**config_values)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = getattr(transformers, class_name)(config)
    # No weight, and not in any file.
    positions = torch.arange(config.max_position_embeddings)[None]
    getattr(model, "text_model", model).embeddings.position_ids = positions
    names, weights, unused = set(model.state_dict()), {}, []
    for name, tensor in checkpoint.weights(part).items():
        # transformers has had this network with and without the prefix.
        bare = name.removeprefix("text_model.")
        chosen = next((n for n in (name, bare, f"text_model.{name}") if n in names), name)
        projects = name == "text_projection.weight" and chosen not in names
        if name.endswith("position_ids") or name.startswith(OTHER_HALF) or projects:
            unused.append(name)
        else:
            weights[chosen] = tensor
    if unused:
        log.debug("%s: %d weights are not used, such as %s", part, len(unused), unused[0])
    return model, weights


def prompt_length(
    configs: Mapping[str, Mapping[str, Any]], tokenizers: Mapping[str, CheckpointTokenizer]
) -> int:
    """The number of ids of every prompt; 0 where there are no text encoders.

    Args:
        configs: of each text encoder, as `text_config` returns them.
        tokenizers: of each text encoder.

    Raises:
        CheckpointError: a tokenizer that does not fit its text encoder, or the other tokenizer.
    """
    lengths = {}
    for part, tokenizer in tokenizers.items():
        config = configs[part]
        _check_vocabulary(part, tokenizer.tokens, config.get("vocab_size", 49408))
        positions = config.get("max_position_embeddings", 77)
        if tokenizer.length is None:
            log.info("%s's tokenizer has no model_max_length; it is %d here", part, positions)
        lengths[part] = length = tokenizer.length or positions
        if not 2 < length <= positions:
            raise CheckpointError(
                f"{part}'s tokenizer has model_max_length {length}, and the text encoder "
                f"{positions} positions; expected 3 to {positions} in tokenizer_config.json"
            )
    if len(set(lengths.values())) > 1:
        said = " and ".join(map(str, lengths.values()))
        raise CheckpointError(f"the tokenizers have model_max_length {said}; expected one length")
    return next(iter(lengths.values()), 0)


def _check_vocabulary(part: str, tokens: int, embedded: int) -> None:
    """Raise CheckpointError unless a text encoder has a row for every token and no other, except
    those that fill its table up to a multiple.
    """
    filled = {-(-tokens // multiple) * multiple for multiple in (1, 8, 16, 32, 64, 128)}
    if embedded not in filled:
        raise CheckpointError(
            f"{part} has rows for {embedded:,} tokens, its tokenizer has {tokens:,}: one of them "
            "is another model's, or lacks words that were added"
        )
