"""A call's prompts, seeds and counts as one request per image.

Knows options; not models.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sdrt.errors import UsageError

from .options import MAX_IMAGES, GenerationOptions, Seed
from .parsing import parse_texts

# Options that an unconditional model has no use for.
CONDITIONING_OPTIONS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "image",
    "image_latents",
    "denoising_end",
    "refiner_switch_at",
    "mask_image",
    "depth_map",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "hires_scale",
    "hires_size",
    "ip_adapter_image",
)


@dataclass(frozen=True, slots=True)
class Request:
    """One image to generate.

    Attributes:
        index: Its place among all images of the call.
        prompt_index: Its prompt's place among the call's prompts.
        prompt: What it shows.
        seed: Of its noise.
        negative_prompt: What it is steered away from.
        recorded_prompt: The prompt in the image's file, if it is not `prompt`.
    """

    index: int
    prompt_index: int
    prompt: str
    seed: int
    negative_prompt: str = ""
    recorded_prompt: str = ""


def parse_requests(prompt: str | Sequence[str] | None, options: GenerationOptions) -> list[Request]:
    """All images of a call, prompt by prompt.

    Raises:
        UsageError: For prompts, counts and seeds that do not fit together.
    """
    prompts = _parse_prompts(prompt, options)
    negative = options.negative_prompt
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise UsageError(
            f"negative_prompt is a list of {len(negatives)} for {_count(len(prompts), 'prompt')}",
            hint="pass one for each prompt, or one for all",
        )
    count = options.num_images_per_prompt
    total = len(prompts) * count
    if not 1 <= total <= MAX_IMAGES:
        raise UsageError(
            f"{_count(count, 'image')} of {_count(len(prompts), 'prompt')}; expected 1 to "
            f"{MAX_IMAGES} in all"
        )
    return [
        Request(i, i // count, prompts[i // count], seed, negatives[i // count])
        for i, seed in enumerate(_assign_seeds(options.seed, total))
    ]


def parse_unconditional_requests(prompt: object, options: GenerationOptions) -> list[Request]:
    """All images of a call of a model without a text encoder.

    Raises:
        UsageError: For a prompt, or an option that conditions the image.
    """
    is_passed = {
        "prompt": prompt not in (None, []),
        "negative_prompt": any(options.negative_prompt),
        **{name: getattr(options, name) is not None for name in CONDITIONING_OPTIONS},
        "clip_skip": bool(options.clip_skip),
    }
    if unsupported := [name for name, passed in is_passed.items() if passed]:
        raise UsageError(
            f"{unsupported[0]} is unsupported by this unconditional model",
            hint="leave it out: the model generates what it was trained on",
        )
    return parse_requests("", options)


def _parse_prompts(prompt: str | Sequence[str] | None, options: GenerationOptions) -> list[str]:
    """The call's prompts; empty ones in place of embeddings."""
    if prompt is None and options.prompt_embeds is None:
        raise UsageError("no prompt", hint="pass a prompt, or prompt_embeds")
    if prompt is not None and options.prompt_embeds is not None:
        raise UsageError("both prompt and prompt_embeds", hint="pass one of them")
    if options.prompt_embeds is not None:
        return [""] * len(options.prompt_embeds)
    parsed = parse_texts("prompt", prompt)
    return [parsed] if isinstance(parsed, str) else list(parsed)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _assign_seeds(seed: Seed, total: int) -> list[int]:
    """One seed for each image: those passed, or counting on from one."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    seeds = [seed + i for i in range(total)] if isinstance(seed, int) else list(seed)
    if len(seeds) != total:
        raise UsageError(
            f"seed is a list of {len(seeds)} for {_count(total, 'image')}",
            hint="pass one for each image, or one for all",
        )
    if max(seeds) >= 2**64:
        raise UsageError(f"seed is {max(seeds)}; expected an integer from 0 to {2**64 - 1}")
    return seeds
