"""The settings of an image as text, for its file.

Knows the names that other tools give to settings; not how the text is laid out (`images.py`).
"""

import json
from collections.abc import Mapping
from typing import Any

from sdrt.bundle.manifest import TEXT_ENCODERS, Manifest
from sdrt.version import __version__

from .controlnet.text import describe_units
from .images import format_parameters, quote
from .job import GenerationJob, HiresPass, RefinerPass
from .lora.adapters import Adapters
from .lora.names import names_outside_folder
from .options import format_number
from .requests import Request
from .samplers.registry import config_overrides, sampler_title
from .textual_inversion.words import EmbeddingSet

RNG_NAMES = {"cpu": "CPU", "cuda": "NV"}


def describe_image(
    request: Request,
    job: GenerationJob,
    manifest: Manifest,
    adapters: Adapters,
    bundle_config: Mapping[str, Any],
    embeddings: EmbeddingSet,
) -> str:
    """The text of one image's file.

    Args:
        request: The image.
        job: Its call.
        manifest: Of the bundle.
        adapters: The LoRA files in use.
        bundle_config: The bundle's own scheduler configuration.
        embeddings: The words of textual inversion that its prompts may have.
    """
    options, (width, height) = job.options, job.size
    title = sampler_title(job.scheduler_config)
    settings: dict[str, object] = {"Steps": options.num_inference_steps, "Sampler": title}
    if any(name in manifest.components for name in TEXT_ENCODERS):
        settings["CFG scale"] = format_number(options.guidance_scale)
    settings |= {"Seed": request.seed, "Size": f"{width}x{height}", "Model": manifest.name}
    if differing := config_overrides(title, job.scheduler_config, bundle_config):
        settings["Sampler options"] = json.dumps(differing, sort_keys=True)
    settings |= options.nondefault_settings | describe_units(job.control_units)
    if job.refiner:
        settings |= describe_refiner(job.refiner)
        del settings["Denoising end"]
    if job.hires:
        settings |= describe_hires(job.hires, job, request)
    prompt = request.recorded_prompt or request.prompt
    if adapters.text and not request.recorded_prompt:
        if options.weighting:
            prompt += adapters.text
        else:  # in the prompt it would be text
            settings["Lora"] = adapters.text.strip()
    files = [file for file, _ in (*adapters.chosen, *(job.lora.files if job.lora else ()))]
    if outside := names_outside_folder(list(dict.fromkeys(files))):
        settings["Lora files"] = ", ".join(outside)
    texts = [request.prompt, request.negative_prompt]
    if job.hires:
        second = job.hires.get_request(request)
        texts += [second.prompt, second.negative_prompt]
    if used := embeddings.find_used(texts):
        settings["TI hashes"] = ", ".join(f"{e.word}: {e.short_hash}" for e in used)
    settings |= {"RNG": RNG_NAMES[options.rng], "Version": f"sdrt {__version__}"}
    return format_parameters(prompt, request.negative_prompt, settings)


def describe_hires(hires: HiresPass, job: GenerationJob, request: Request) -> dict[str, object]:
    """The settings of a second pass, under A1111's names and in its order."""
    options = job.options
    settings: dict[str, object] = {"Denoising strength": format_number(options.hires_strength)}
    if hires.job.scheduler_config != job.scheduler_config:
        settings["Hires sampler"] = sampler_title(hires.job.scheduler_config)
    second = hires.get_request(request)
    if hires.prompts is not None:
        settings["Hires prompt"] = second.prompt
    if hires.negative_prompts is not None:
        settings["Hires negative prompt"] = second.negative_prompt
    if options.hires_guidance_scale is not None:
        settings["Hires CFG Scale"] = format_number(options.hires_guidance_scale)
    if options.hires_scale is not None:
        settings["Hires upscale"] = format_number(options.hires_scale)
    if options.hires_size is not None:
        settings["Hires resize"] = "x".join(map(str, options.hires_size))
    if options.hires_steps:
        settings["Hires steps"] = options.hires_steps
    return settings | {"Hires upscaler": hires.upscaler.title}


def describe_refiner(refiner: RefinerPass) -> dict[str, object]:
    """The settings of a refiner's part of a run, under A1111's names."""
    options = refiner.job.options
    scores = {
        name: format_number(score)
        for name, score in (
            ("Aesthetic score", options.aesthetic_score),
            ("Negative aesthetic score", options.negative_aesthetic_score),
        )
        if score is not None
    }
    return {
        "Refiner": refiner.name,
        "Refiner switch at": format_number(refiner.switch_at),
        **scores,
    }


def describe_grid(first_image: str, job: GenerationJob) -> str:
    """The text of a grid's file: the first image's, then seeds and prompts where they differ."""
    lists: dict[str, list[Any]] = {
        "Seeds": [request.seed for request in job.requests],
        "Prompts": [request.recorded_prompt or request.prompt for request in job.requests],
        "Negative prompts": [request.negative_prompt for request in job.requests],
    }
    if job.hires and job.hires.prompts is not None:
        lists["Hires prompts"] = [job.hires.get_request(r).prompt for r in job.requests]
    differing = {name: values for name, values in lists.items() if len(set(values)) > 1}
    return first_image + "".join(f", {name}: {quote(values)}" for name, values in differing.items())
