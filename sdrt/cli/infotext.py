"""`sdrt run --from`: an image's own text as the arguments that make the same image again.

Knows the settings that sdrt writes into a PNG, those of the AUTOMATIC1111 web UI that mean the same
here, and the command line's names for them. What would change the image and is not understood is
refused by name.
"""

import argparse
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.errors import UsageError
from sdrt.json_validation import shorten
from sdrt.runtime.controlnet.text import SETTING, argument_from_setting, parse_setting
from sdrt.runtime.hires_options import HIRES_SIZE_IN_TEXT
from sdrt.runtime.images import open_image, parse_parameters, read_parameters, unquote
from sdrt.runtime.lora.tags import LoraTag, LoraWeight, parse_tags
from sdrt.runtime.options import SIZES_IN_TEXT
from sdrt.runtime.samplers.registry import AUTOMATIC_SCHEDULES
from sdrt.runtime.text.prompt_schedule import refuse_single_weight
from sdrt.runtime.textual_inversion.words import EmbeddingSet

log = logging.getLogger(__name__)
EMBEDDING_HASH = re.compile(r"(?:\A|, )(.+?): ([0-9a-f]{12})(?=, |\Z)")
OURS = "sdrt "  # how `Version` begins


@dataclass(frozen=True, slots=True)
class Restored:
    """What an image's text asks for.

    arguments: by the command line's names; what is typed with `--from` overrides them
    loras: every LoRA's weight by its name
    embedding_hashes: of the words of textual inversion that it used
    needed: arguments that the text cannot hold and that must be typed, with what they are
    """

    arguments: Mapping[str, Any]
    loras: Mapping[str, LoraWeight]
    needed: Mapping[str, str]
    embedding_hashes: Mapping[str, str]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split()]


def _pair(text: str) -> tuple[int, int]:
    """ "ACROSSxDOWN" -> (down, across)"""
    across, down = text.split("x")
    return int(down), int(across)


def _list_of(kind: type) -> Callable[[str], list[Any]]:
    """A list of JSON with at least one item, all of one type."""

    def read(text: str) -> list[Any]:
        values = json.loads(text)
        if not isinstance(values, list) or {type(value) for value in values} != {kind}:
            raise ValueError(text)
        return values

    return read


def _sampler_options(text: str) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in json.loads(text).items()]


# Settings by their name in a text: the argument of the command line, and how its value is read.
ARGUMENTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("num_inference_steps", int),
    "Sampler": ("scheduler", str),
    "Sampler options": ("scheduler_option", _sampler_options),
    "CFG scale": ("guidance_scale", float),
    "CFG rescale": ("guidance_rescale", float),
    "CFG interval": ("guidance_interval", str),
    "Seed": ("seed", int),
    "Seeds": ("seed", _list_of(int)),
    "Size": ("size", str),
    "Denoising strength": ("strength", float),
    "Clip skip": ("clip_skip", lambda text: int(text) - 1),
    "Feature reuse": ("feature_reuse", int),
    "Feature reuse order": ("feature_reuse_order", int),
    "Output reuse": ("output_reuse", int),
    "Long prompts": ("long_prompts", {"cut": "cut"}.__getitem__),
    "Emphasis": ("weighting", {"None": False, "Original": True}.__getitem__),
    "RNG": ("rng", {"CPU": "cpu", "NV": "cuda", "GPU": "cuda"}.__getitem__),
    **{
        f"Hires {name}": (f"hires_{option}", read)
        for name, option, read in (
            ("upscale", "scale", float),
            ("resize", "size", str),
            ("steps", "steps", int),
            ("strength", "strength", float),
            ("upscaler", "upscaler", str),
            ("sampler", "scheduler", str),
            ("prompt", "prompt", str),
            ("negative prompt", "negative_prompt", str),
            ("CFG Scale", "guidance_scale", float),
        )
    },
    "Refiner": ("refiner", str),
    "Refiner switch at": ("refiner_switch_at", float),
    "Aesthetic score": ("aesthetic_score", float),
    "Negative aesthetic score": ("negative_aesthetic_score", float),
    "Timesteps": ("timesteps", _numbers),
    "Sigmas": ("sigmas", _numbers),
    **{name: (option, _pair) for name, option in SIZES_IN_TEXT.items()},
}
PROMPTS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Prompts": ("prompt", _list_of(str)),
    "Negative prompts": ("negative_prompt", _list_of(str)),
}
NEEDED = {
    "Denoising strength": ("image", "--image, the image that it started from"),
    "Mask": ("mask_image", "--mask, its mask"),
    "Depth map": ("depth_map", "--depth, its depth map"),
    "IP-Adapter scale": ("ip_adapter", "--ip-adapter NAME=FILE:SCALE, its image prompt"),
    "Lora files": ("lora", "--lora for each of its LoRAs, as not all are in the folder loras"),
}
LOST = {
    "Latents": "latents of its own",
    "Prompt embeds": "embeddings instead of a prompt",
    "Negative prompt embeds": "embeddings instead of a negative prompt",
    "Callback": "a function called after every step",
    "Image latents": "latents instead of an image",
    "Denoising start": "another model's latents",
    "Denoising end": "a run that another model goes on with",
}
READ_APART = {
    "TI hashes",
    "Prompt",
    "Negative prompt",
    "Prompts",
    "Negative prompts",
    "Lora",
    "Model",
    "Version",
}
READ_APART |= {"Schedule type", "Hires schedule type"}
# Of other tools: what says where an image came from but does not shape it, or is the bundle's.
NEUTRAL = {"Model hash", "VAE", "VAE hash", "Hashes", "Lora hashes", "Batch size", "Batch pos"}
NEUTRAL |= {"User", "Time taken"}


def restored_from(path: Path) -> Restored:
    """What the text of an image's file asks for; raises UsageError for one without, and for what
    would change the image and is not understood.
    """
    text = read_parameters(open_image(path))
    settings = {key: unquote(value) for key, value in parse_parameters(text).items()}
    if any(name in settings for name in HIRES_SIZE_IN_TEXT) and "Denoising strength" in settings:
        settings["Hires strength"] = settings.pop("Denoising strength")  # of the second pass
    if "Steps" not in settings:
        raise UsageError(f"{path} holds no text that says how it was made; give a prompt instead")
    for name, value in settings.items():
        if name in LOST:
            raise UsageError(
                f"{path} was made with {LOST[name]}, which its text does not hold; it can be "
                "made again from Python alone"
            )
        if name in NEUTRAL:
            log.debug("%s: %s is passed over", name, shorten(value))
        elif name not in {*ARGUMENTS, *NEEDED, *READ_APART} and not SETTING.fullmatch(name):
            raise UsageError(
                f"{path} was made with {name!r} ({shorten(value)}), which is unsupported here, "
                "so that the image would be another one"
            )
    if "Lora files" in settings and "Prompts" in settings:
        raise UsageError(
            f"{path} was made of several prompts with LoRA files outside the folder loras "
            f"({shorten(settings['Lora files'])}), which its text does not hold; put them into "
            "the folder and make it again"
        )
    arguments = _read(path, settings, {**ARGUMENTS, **PROMPTS})
    loras = _extract_tags(settings, arguments)
    if settings.get("Version", "").startswith(OURS):
        arguments["bundle"] = settings.get("Model")
    else:
        refuse_single_weight(settings["Prompt"])
        arguments |= _foreign_arguments(settings, arguments)
    needed = {name: words for key, (name, words) in NEEDED.items() if key in settings}
    units = [value for key, value in settings.items() if SETTING.fullmatch(key)]
    if units:
        typed = " ".join(argument_from_setting(unit) for unit in units)
        needed["control"] = f"{typed}, with the control images"
        if any(parse_setting(unit).get("Guess Mode") == "True" for unit in units):
            arguments["guess_mode"] = True
    words = dict(EMBEDDING_HASH.findall(settings.get("TI hashes", "")))
    return Restored(arguments, loras, needed, words)


def check_embeddings(hashes: Mapping[str, str], embeddings: EmbeddingSet) -> None:
    """Raise UsageError for a word of an image that is not loaded; warn of another file's."""
    loaded = {embedding.word: embedding.short_hash for embedding in embeddings.embeddings}
    for word, short_hash in hashes.items():
        if word not in loaded:
            raise UsageError(
                f"the image used the embedding {word!r} ({short_hash}), which is not loaded",
                hint=f"pass --embedding FILE:{word}, or put its file into $SDRT_HOME/embeddings",
            )
        if loaded[word] != short_hash:
            log.warning(
                "the image used another embedding %r: %s, here is %s",
                word,
                short_hash,
                loaded[word],
            )


def _read(
    path: Path, settings: Mapping[str, str], readers: Mapping[str, tuple[str, Callable[[str], Any]]]
) -> dict[str, Any]:
    values = {}
    for key, (name, read) in readers.items():
        if key in settings:
            try:
                values[name] = read(settings[key])
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UsageError(
                    f"{path}: its text says {key}: {shorten(settings[key])}, which is not "
                    "understood"
                ) from None
    return values


def _extract_tags(settings: Mapping[str, str], arguments: dict[str, Any]) -> dict[str, LoraWeight]:
    """Put the prompts, one alone without LoRA tags, and their count among the arguments; gives the
    LoRAs of those tags.
    """
    prompts = arguments.get("prompt", [settings["Prompt"]])
    tags: tuple[LoraTag, ...] = ()
    if arguments.get("weighting") is False:
        _, tags = parse_tags(settings.get("Lora", ""))
    elif "Prompts" not in settings:  # of several, each keeps its own
        _, tags = parse_tags(settings["Prompt"])
        prompts = [parse_tags(prompt)[0].strip() for prompt in prompts]
    arguments["prompt"] = prompts
    arguments.setdefault("negative_prompt", settings["Negative prompt"])
    if "Seeds" in settings:
        arguments["grid"] = True
        arguments["num_images_per_prompt"] = len(arguments["seed"]) // len(prompts)
    loras: dict[str, LoraWeight] = {}
    for tag in tags:
        loras[tag.name] = loras.get(tag.name, LoraWeight(0.0, 0.0)) + tag.weight
    return loras


def _foreign_arguments(settings: Mapping[str, str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a text of the web UI leaves unsaid: whose noise it is, and the sampler's schedule."""
    changed = {"rng": arguments.get("rng", "cuda")}
    schedule = settings.get("Schedule type", "")
    schedules = {
        "scheduler": schedule,
        "hires_scheduler": settings.get("Hires schedule type", schedule),
    }
    for name, label in schedules.items():
        if sampler := str(arguments.get(name, "")):
            automatic = AUTOMATIC_SCHEDULES.get(sampler, "")
            joined = f"{sampler} {automatic if label == 'Automatic' else label}"
            changed[name] = joined.strip()
    return changed


def apply_typed(args: argparse.Namespace, restored: Restored) -> argparse.Namespace:
    """The arguments as typed over those of an image; raises UsageError where one is missing."""
    for name, words in restored.needed.items():
        if getattr(args, name) in (None, []):
            raise UsageError(f"{args.source}: its text does not hold everything; give {words}")
    args.loras = dict(restored.loras)
    args.embedding_hashes = dict(restored.embedding_hashes)
    if args.scheduler != restored.arguments.get("scheduler"):
        theirs = restored.arguments.get("scheduler_option", [])
        args.scheduler_option = args.scheduler_option[len(theirs) :]
    if args.num_inference_steps != restored.arguments.get("num_inference_steps"):
        args.timesteps = args.sigmas = None
    if args.preset is not None:
        for name in ("feature_reuse", "feature_reuse_order", "output_reuse"):
            if getattr(args, name) == restored.arguments.get(name):
                setattr(args, name, None)
    return args
