"""The names that LoRA files give their tensors, brought to one form: part, module, kind of factor.

Knows the layouts of kohya's scripts and LyCORIS (`lora_unet_..`, `lora_te_..`), of PEFT and
diffusers (`unet.` and `text_encoder.` with `lora_A`, `lora.down`, `processor.to_q_lora`), of the
original checkpoints (`diffusion_model.input_blocks..`, OpenCLIP's `resblocks`). Not what the
factors compute, nor the settings that scale them.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from sdrt.errors import CheckpointError
from sdrt.json_validation import shorten
from sdrt.runtime.textual_inversion.layouts import BUNDLED

from .deltas import Change
from .settings import add_settings

log = logging.getLogger(__name__)

MAX_NAMED = 5  # keys that a message names
PARTS = ("unet", "text_encoder", "text_encoder_2")
UNDERSCORED = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
DOTTED = {
    "unet.": "unet",
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
WRAPPERS = ("base_model.model.", "lycoris_")
UNPREFIXED = {  # how a module begins that stands without the name of its part
    "unet": r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block"
    r"|conv_in|conv_out|conv_norm_out|time_embed|time_embedding|add_embedding)([._]|$)",
    "text_encoder": r"(text_model[._])?(encoder[._]layers|embeddings|final_layer_norm)([._]|$)",
}
FACTORS = {
    "lora_down": "down",
    "lora_A": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_up": "up",
    "lora_B": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "lora_mid": "mid",
}
KINDS = {  # of tensors that are called what they are: what each is here
    "lora_magnitude_vector": "magnitude",
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "bias",
    "b_norm": "bias",
}
VECTORS, SINGLE = {"bias", "up_bias"}, {"alpha", "on_input"}
MATRICES = re.compile(r"down|up|mid|hada_\w+|lokr_\w+")
TAIL = re.compile(
    rf"(?:\.(?P<factor>{'|'.join(map(re.escape, FACTORS))})(?:\.[^.]+)?\.(?P<end>weight|bias)"
    r"|_lora\.(?P<old>down|up)\.weight"
    r"|(?:_lora)?\.(?P<kind>alpha|dora_scale|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]"
    r"|lokr_w[12](?:_[ab])?|lokr_t2|diff_b|diff|w_norm|b_norm|on_input)(?:\.[^.]+){0,2}"
    r"|\.(?P<whole>weight))$"
)
SUPPORTED = "LoRA, LoCon, LoHa, LoKr, DoRA, (IA)^3, and differences of weights, norms and biases"
UNSUPPORTED = {
    "OFT": r"\.oft_\w+",
    "BOFT": r"\.boft_\w+",
    "GLoRA": r"\.[ab][12]\.weight$",
    "T-LoRA": r"\.(lambda_layer|[qp]_layer\.weight)$",
    "(IA)^3 of PEFT": r"\.ia3_l\b",
    "VeRA": r"\.vera_\w+",
    "AdaLoRA": r"\.lora_E\b",
    "LoRA of an embedding": r"\.lora_embedding_[AB]\b",
    "a layer trained whole": r"\.(modules_to_save|base_layer|set_weight)\b",
}
OTHER_FAMILY = re.compile(r"(transformer|lora_transformer|lora_prior|lora_te3|text_encoder_3)[._]")
ORIGINAL_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
ORIGINAL_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
SIDES = {"input": "down_blocks", "output": "up_blocks"}
OPENCLIP = {
    "attn_in_proj": "self_attn_in_proj",
    "attn_out_proj": "self_attn_out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp_c_fc": "mlp_fc1",
    "mlp_c_proj": "mlp_fc2",
}
IN_PROJ = "self_attn_in_proj"
BIAS = ".bias"  # what the name of a module ends in where its bias is meant
LayerKey = tuple[str, str]  # a part, and a module of it with underscores for dots


def parse_changes(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
) -> dict[LayerKey, Change]:
    """The changes of a file.

    Args:
        tensors: by the names of any layout.
        metadata: of the file; `lora_adapter_metadata` is read.
        config: PEFT's `adapter_config.json`, where there is one.

    Returns:
        By part and module; where a bias is changed, the module's name ends in `.bias`.

    Raises:
        CheckpointError: keys of no known layout or of an algorithm that is not supported, counted
            and the first named; numbers that are none; settings that are not understood.
    """
    changes: dict[LayerKey, Change] = {}
    modules: dict[LayerKey, str] = {}
    unknown = []
    for key, tensor in tensors.items():
        if key.startswith(BUNDLED):
            continue
        if not (matched := _parse_key(key)):
            unknown.append(key)
        else:
            place, head, module, kind = matched
            _check_tensor(key, kind, tensor)
            factors = changes.setdefault(place, Change(head)).factors
            if kind in factors:
                raise CheckpointError(f"{shorten(key)} says again what another key said")
            factors[kind] = tensor
            modules[place] = module
    unknown += _resolve_ia3_scales(changes)
    if unknown:
        raise CheckpointError(_unknown(unknown))
    add_settings(changes, modules, metadata, config)
    return _finish_layers(changes)


def _parse_key(key: str) -> tuple[LayerKey, str, str, str] | None:
    """A tensor's place, its module as the file names it and by PEFT's name, and what it is."""
    tail = TAIL.search(key)
    if not tail:
        return None
    head = key[: tail.start()]
    if not (matched := _split_part(head)):
        return None
    part, module = matched
    module = module.replace(".processor", "")
    kind = tail["kind"] or tail["old"] or tail["whole"] or FACTORS[tail["factor"]]
    if tail["end"] == "bias":
        if kind != "up":
            return None
        kind = "up_bias"
    return (part, _diffusers_name(part, flat(module))), head, module, KINDS.get(kind, kind)


def _split_part(head: str) -> tuple[str, str] | None:
    """The part that a module's name leads to, and the name without its prefixes."""
    for prefixes in (UNDERSCORED, DOTTED):
        for wrapper in ("", *WRAPPERS):
            for prefix, part in prefixes.items():
                if head.startswith(wrapper + prefix) and len(head) > len(wrapper + prefix):
                    module = head.removeprefix(wrapper + prefix)
                    return part, module.removeprefix(WRAPPERS[0])
    for wrapper in WRAPPERS:
        head = head.removeprefix(wrapper)
    for part, start in UNPREFIXED.items():
        if re.match(start, head):
            return part, head
    return None


def _check_tensor(key: str, kind: str, tensor: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(tensor.astype(np.float32, copy=False)).all()
    if not finite:
        raise CheckpointError(f"{key} holds NaN or infinity")
    axes = (2, 4) if MATRICES.fullmatch(kind) else (1,) if kind in VECTORS else range(5)
    if tensor.ndim not in axes or not tensor.size or (kind in SINGLE and tensor.size != 1):
        raise CheckpointError(f"{key} is of shape {list(tensor.shape)}, which is no {kind}")


def _resolve_ia3_scales(changes: Mapping[LayerKey, Change]) -> list[str]:
    """(IA)^3 says by a number whether its `weight` is along the inputs. A `weight` without that
    number is of no known layout, and returned.
    """
    unknown = []
    for change in changes.values():
        factors = change.factors
        if "weight" in factors and "on_input" in factors:
            side = "input" if factors.pop("on_input").any() else "output"
            factors[f"{side}_scale"] = factors.pop("weight")
        elif "weight" in factors:
            unknown.append(f"{change.key}.weight")
    return unknown


def _finish_layers(changes: Mapping[LayerKey, Change]) -> dict[LayerKey, Change]:
    """Each change of one weight or one bias; those that hold an alpha alone shape nothing."""
    settled: dict[LayerKey, Change] = {}
    for (part, module), change in changes.items():
        factors, idle = change.factors, {"alpha", "on_input"}
        scale = np.float32(change.scale(len(factors["down"]))) if "down" in factors else 1
        biases = [factors.pop(n) * (scale if n == "up_bias" else 1) for n in VECTORS & {*factors}]
        if len(biases) > 1:
            raise CheckpointError(f"the LoRA's {change.key} has two biases")
        if biases:
            settled[part, module + BIAS] = Change(change.key + BIAS, {"diff": biases[0]})
        if set(factors) <= idle:
            if not biases:
                log.info("%s has an alpha alone, which changes nothing", change.key)
        elif module.endswith(IN_PROJ):
            settled |= _split_qkv(part, module.removesuffix(IN_PROJ), change)
        else:
            settled[part, module] = change
    return settled


def _split_qkv(part: str, before: str, change: Change) -> dict[LayerKey, Change]:
    """OpenCLIP has one layer for what are three here."""
    if surplus := sorted(set(change.factors) - {"down", "up", "alpha"}):
        raise CheckpointError(
            f"the LoRA's {change.key} has {', '.join(surplus)}, which is not supported for "
            "queries, keys and values in one layer"
        )
    return {
        (part, f"{before}self_attn_{letter}_proj"): Change(
            change.key, change.factors, change.rank_stabilised, change.rank, third
        )
        for third, letter in enumerate("qkv")
    }


def flat(module: str) -> str:
    """A module's name as kohya writes it, without what wrappers put before it."""
    return module.replace(".", "_").removeprefix("model_").removeprefix("text_model_")


def is_unused(part: str, module: str, names: Collection[str]) -> bool:
    """Whether a module of a text encoder comes after all that a bundle holds of it: its last layer
    and the final norm, where images are drawn by what the layer before that gives.
    """
    if module in names or not part.startswith("text_encoder"):
        return False
    layer, rest = re.fullmatch(r"encoder_layers_(\d{1,3})(_.+)", module), module
    if not layer:
        return rest.startswith("final_layer_norm")
    number, rest = int(layer[1]), layer[2]
    held = any(name.startswith(f"encoder_layers_{number}_") for name in names)
    return not held and f"encoder_layers_{number - 1}{rest}" in names


def _diffusers_name(part: str, module: str) -> str:
    """The usual name of a module that the original layout names, as many LoRA files do."""
    if part != "unet":
        return _transformers_name(module)
    if module in ORIGINAL_ENDS:
        return ORIGINAL_ENDS[module]
    match = re.fullmatch(r"(input|middle|output)_blocks?_(\d{1,3})_(.+)", module)
    if not match:
        return module + "_0" if module.endswith("_to_out") else module
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle":
        place = "attentions_0" if number == 1 else f"resnets_{number // 2}"
        return f"mid_block_{place}_{ORIGINAL_RESNET.get(rest, rest)}"
    slot, _, rest = rest.partition("_")
    block, layer = divmod(number - 1 if side == "input" else number, 3)
    if rest in ("op", "conv"):
        change = "downsamplers" if side == "input" else "upsamplers"
        return f"{SIDES[side]}_{block}_{change}_0_conv"
    part = "resnets" if slot == "0" else "attentions"
    return f"{SIDES[side]}_{block}_{part}_{layer}_{ORIGINAL_RESNET.get(rest, rest)}"


def _transformers_name(module: str) -> str:
    """OpenCLIP's names as transformers has them, and those that diffusers once gave to both."""
    if match := re.fullmatch(r"transformer_resblocks_(\d+)_(.+?)(_weight)?", module):
        return f"encoder_layers_{match[1]}_{OPENCLIP.get(match[2], match[2])}"
    if match := re.fullmatch(r"(encoder_layers_\d+_self_attn)_to_(q|k|v|out)(_0)?", module):
        return f"{match[1]}_{match[2]}_proj"
    return "final_layer_norm" if module == "ln_final" else module


def _unknown(keys: Sequence[str]) -> str:
    for algorithm, pattern in UNSUPPORTED.items():
        if matched := [key for key in keys if re.search(pattern, key)]:
            return f"{format_keys(matched)} of {algorithm}, which is not supported; use {SUPPORTED}"
    if matched := [key for key in keys if OTHER_FAMILY.match(key)]:
        return f"{format_keys(matched)} of another family of models; expected Stable Diffusion's"
    return (
        f"{format_keys(keys)} of no known layout; expected kohya's lora_unet_.. and lora_te_.., or "
        f"PEFT's unet. and text_encoder.; supported are {SUPPORTED}"
    )


def format_keys(keys: Sequence[str]) -> str:
    """How many keys, and the first of them."""
    more = ", .." if len(keys) > MAX_NAMED else ""
    named = ", ".join(keys[:MAX_NAMED])
    return f"{len(keys)} {'keys' if len(keys) > 1 else 'key'} ({named}{more})"
