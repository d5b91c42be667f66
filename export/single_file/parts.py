"""Which parts of a model a single file holds, by the names of its tensors.

Knows the prefixes and the layouts in which UNets, autoencoders and text encoders are published, the
names that shape nothing, and what other kinds of files look like. Reads no file.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sdrt.errors import CheckpointError

OPTIONS = {
    "unet": "--unet",
    "vae": "--vae",
    "text_encoder": "--text-encoder",
    "text_encoder_2": "--text-encoder-2",
}
# The place of the text encoder of 2.x and of XL's refiner, in the layout that XL was published in.
LATER_TEXT = "conditioner.embedders.0.model."
# The input of the UNet's layers for the pooled prompt and sizes, which 2.x does not have.
ADDED = (".label_emb.0.0.weight", ".add_embedding.linear_1.weight")
# Where each part's names may begin, the most telling first; "" for a file of that part alone.
PREFIXES = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
    "text_encoder": (
        *("cond_stage_model.transformer.", "cond_stage_model.model."),
        *("conditioner.embedders.0.transformer.", LATER_TEXT),
        *("text_encoder.", "clip_l.transformer.", ""),
    ),
    "text_encoder_2": (
        *("conditioner.embedders.1.model.", "conditioner.embedders.1.transformer.", LATER_TEXT),
        *("text_encoder_2.", "clip_g.transformer.", ""),
    ),
}
# What the names of each layout look like behind the prefix.
_TEXT = {
    "transformers": re.compile(
        r"(text_model\.)?(embeddings\.\w+_embedding|encoder\.layers\.\d+)\."
    ),
    "open_clip": re.compile(r"(token_embedding|transformer\.resblocks\.\d+)\."),
}
_TEXT_PARTS = ("text_encoder", "text_encoder_2")
SIGNS = {
    "unet": {
        "original": re.compile(r"(input_blocks|middle_block|output_blocks)\.\d+\."),
        "diffusers": re.compile(r"up_blocks\.\d+\.(resnets|attentions)\."),
    },
    "vae": {
        "original": re.compile(r"(encoder\.down|decoder\.up)\.\d+\."),
        "diffusers": re.compile(r"(encoder\.down_blocks|decoder\.up_blocks)\.\d+\."),
        "tiny": re.compile(r"decoder\.layers\.\d+\.(conv\.\d+\.)?weight"),
    },
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
}
_SHAPES_NOTHING = re.compile(
    r"(?P<group>(.*\.)?model_ema|loss|.*\.loss|denoiser|model_sampling|depth_model|safety_checker"
    r"|optimizer_states|optimizer|lr_schedulers?|callbacks|loops|hyper_parameters)\..*"
    r"|.*sqrt_(recip_|recipm1_|one_minus_)?alphas_cumprod|(.*\.)?alphas_cumprod(_prev)?"
    r"|(.*\.)?(betas|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|scale_factor)"
    r"|(.*\.)?(position_ids|logit_scale|attn_mask|num_batches_tracked)"
    r"|(cond_stage_model|conditioner\.embedders\.0)\..*text_projection(\.weight)?"
    r"|global_step|epoch|step|iteration|state|pytorch-lightning_version|v_pred|ztsnr|sigmas"
    r"|log_sigmas"
)
# Of full CLIP models, and of OpenCLIP's text model alone.
_NO_TEXT = re.compile(
    r"(vision_model|visual|visual_projection)\..*|context_length|input_resolution|vocab_size"
)
MAX_SHOWN = 60  # names in one line
LAYERS_READ = 23  # of 24 in 2.x: its context is the last layer's but one
_PROJECTION = re.compile(r"text_projection(\..*)?")
# What other files look like; the first that fits is named.
_OTHERS = (
    (r".*(lora_|\.lora\.|\.hada_|\.lokr_|\.oft_|dora_scale)", "a LoRA", "type --lora FILE"),
    (r"(control_model\.|controlnet_|.*input_hint_block|.*zero_convs)", "a ControlNet", ""),
    (r"(ip_adapter|image_proj)\.", "an IP-Adapter", ""),
    (r".*motion_modules", "a motion module for video", ""),
    (r"(.*\.)?joint_blocks\.", "a model of Stable Diffusion 3", ""),
    (r"(.*\.)?(double_blocks|double_stream_modulation\w*)\.", "a model of the FLUX family", ""),
    (r"(.*\.)?(RRDB_trunk|rdb\d|conv_body)\.", "an upscaler", ""),
    (r"(emb_params|clip_[lg]|\*|string_to_param.*|<.*>)$", "a textual inversion embedding", ""),
)


@dataclass(frozen=True, slots=True)
class PartLocation:
    """One part in a file: where its names begin, and in which layout it is."""

    part: str
    prefix: str
    layout: str


def find_part_in(keys: Collection[str], part: str) -> PartLocation | None:
    """Where a file of these names holds a part, or None if it does not."""
    for prefix in PREFIXES[part]:
        own = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        for layout, sign in SIGNS[part].items():
            if any(sign.match(name) for name in own):
                return PartLocation(part, prefix, layout)
    return None


def find_parts(keys: Collection[str]) -> dict[str, PartLocation]:
    """Every part that a file of these names holds.

    Text encoders without a prefix are the first: which of two they are, no name tells.
    """
    actual = {part: find_part_in(keys, part) for part in PREFIXES}
    cached = {part: item for part, item in actual.items() if item is not None}
    if "text_encoder_2" in cached and not cached["text_encoder_2"].prefix:
        del cached["text_encoder_2"]
    later = [part for part in _TEXT_PARTS if part in cached and cached[part].prefix == LATER_TEXT]
    if later:  # it is the first of 2.x, the second of a refiner
        is_refiner = any(f".{key}".endswith(ADDED) for key in keys)
        del cached[_TEXT_PARTS[0 if is_refiner else 1]]
    return cached


def shapes_nothing(key: str) -> bool:
    """Whether a name belongs to training, schedules that are computed here, or markers."""
    return bool(_SHAPES_NOTHING.fullmatch(key))


def shapes_nothing_of(part: str, name: str, last_layer_unread: bool) -> bool:
    """The same of a name behind a part's prefix.

    last_layer_unread: whether it is the text encoder of 2.x, whose last layer nothing reads
    """
    if shapes_nothing(name):
        return True
    if not part.startswith("text_encoder"):
        return False
    if _NO_TEXT.fullmatch(name) or (part == "text_encoder" and _PROJECTION.fullmatch(name)):
        return True
    layer = re.match(r"(?:transformer\.resblocks|(?:text_model\.)?encoder\.layers)\.(\d+)\.", name)
    return bool(last_layer_unread and layer and int(layer[1]) >= LAYERS_READ)


def seems_to_be(keys: Collection[str]) -> str | None:
    """What a file that is no whole model seems to be, with what to do about it; None if unknown."""
    for pattern, what, hint in _OTHERS:
        if any(re.match(pattern, key) for key in keys):
            return f"it seems to be {what}" + (f": {hint}" if hint else ", which is not read here")
    names = {"unet": "a UNet", "vae": "an autoencoder", "text_encoder": "a text encoder"}
    actual = find_parts(keys)
    if len(actual) == 1 and (part := next(iter(actual))) in names:
        return f"it seems to be {names[part]} alone: type --model MODEL {OPTIONS[part]} FILE"
    return None


def described(keys: Iterable[str]) -> str:
    """Names for one line: what belongs together is counted, not listed."""
    groups: Counter[str] = Counter()
    for key in keys:
        match = _SHAPES_NOTHING.fullmatch(key)
        full = match["group"] if match else None
        layer = re.match(r"(.*?\b(?:(?:resblocks|layers)\.\d+|vision_model|visual))\.", key)
        full = full or (layer[1] if layer else None)
        groups[f"{full}.*" if full else key] += 1
    shown = [f"{name} ({n})" if n > 1 else name for name, n in groups.items()]
    more = f" (and {len(shown) - MAX_SHOWN} others)" if len(shown) > MAX_SHOWN else ""
    return ", ".join(shown[:MAX_SHOWN]) + more


def refuse_unknown(keys: Collection[str], where: str) -> None:
    """Raise CheckpointError for names that may shape the result and are not understood."""
    if not keys:
        return
    first = sorted(keys)[:3]
    more = f" (and {len(keys) - 3} others)" if len(keys) > 3 else ""
    raise CheckpointError(
        f"{where} holds {', '.join(first)}{more}, which no part of a Stable Diffusion model takes "
        "and which may shape the image; convert only what is fully understood, or remove them"
    )
