"""What users of diffusers look for on a pipeline, and what to use here.

Knows names; not what a pipeline does.
"""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from sdrt.errors import UsageError

_SCHEDULER = 'use pipe.with_scheduler("DPM++ 2M Karras"), which returns another pipeline'
_LORA = 'use pipe.set_lora({"name": 0.8}), and pipe.set_lora({}) to remove all'
_PLACE = 'pass device="cuda" or "cpu" to sdrt.load'
_MEMORY = "pass low_memory=True to sdrt.load"
_ALWAYS = "leave it out: attention is fused, and large images are decoded in tiles"
_COMPONENT = "components are compiled; see pipe.engines and pipe.manifest"
_BUILD = 'use sdrt.build("checkpoint") once, then sdrt.load'
_CALL = "pass it to a call, as in pipe(prompt, progress=True)"
# What to do instead, by name or pattern; the first that fits.
INSTEAD = {
    "scheduler": _SCHEDULER,
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float"), _PLACE),
    **dict.fromkeys(("*lora*", "*_adapters"), _LORA),
    "*ip_adapter*": "load an IP-Adapter with the pipeline: sdrt.load(..., ip_adapter=NAME)",
    "*textual_inversion": "use pipe.load_textual_inversion and pipe.unload_textual_inversion",
    "*freeu": "FreeU is unsupported",
    "enable_*_offload": _MEMORY,
    **dict.fromkeys(("enable_*", "disable_*", "*_attention*", "*fuse_qkv*", "upcast_vae"), _ALWAYS),
    **dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2", "components"), _COMPONENT),
    **dict.fromkeys(("safety_checker", "image_processor", "feature_extractor"), _COMPONENT),
    **dict.fromkeys(("from_pretrained", "from_single_file", "from_pipe"), _BUILD),
    "save_pretrained": "a bundle is a folder: copy that of sdrt.bundles()",
    "set_progress_bar_config": _CALL,
    "progress_bar": _CALL,
    "device": "see pipe.backend",
    "dtype": "see pipe.precision",
    "config": "see pipe.manifest and pipe.scheduler_config",
    "encode_prompt": "pass prompt_embeds to a call",
}


class UnsupportedAttribute(UsageError, AttributeError):
    """A pipeline has no such attribute; the hint says what to use."""


def refuse_attribute(name: str, names: Iterable[str] = ()) -> UnsupportedAttribute:
    """The error for an attribute.

    Args:
        name: What was looked for.
        names: The attributes that there are.
    """
    public = [other for other in names if other[0] != "_"]
    hint = next((hint for pattern, hint in INSTEAD.items() if fnmatchcase(name, pattern)), None)
    if hint is None and (near := difflib.get_close_matches(name, public, n=1)):
        hint = f"did you mean {near[0]}?"
    return UnsupportedAttribute(f"a pipeline has no {name!r}", hint=hint)


def refuse_copy() -> UsageError:
    """The error for `pickle`, `copy` and what hands a pipeline to another process."""
    hint = "call sdrt.load in every process; threads can share one pipeline"
    return UsageError("a pipeline cannot be pickled or copied", hint=hint)


def refuse_change(statement: str) -> UnsupportedAttribute:
    """The error for a statement such as `scheduler = ...`."""
    hint = refuse_attribute(statement.partition(" ")[0]).hint
    return UnsupportedAttribute(f"a pipeline cannot be changed: {statement}", hint=hint)
