"""The named arguments of a call: their types, those that only diffusers has, and hints for others.

Knows names; what an option's values may be is decided in `options.py`.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike
from PIL.Image import Image

from sdrt.errors import UsageError

from .generators import GeneratorLike, seed_from_generator
from .options import PARSERS, Callback, GenerationOptions
from .parsing import int_parser, invalid_argument
from .presets import expand_preset

ImageLike = Image | str | os.PathLike[str] | ArrayLike
Pair = Sequence[int] | None


class GenerationKwargs(TypedDict, total=False):
    """The named arguments of a call; see `GenerationOptions` for what they mean.

    `height`, `width`, `generator` and `callback_on_step_end_tensor_inputs` are diffusers' names for
    `size`, `seed` and what the callback gets.
    """

    negative_prompt: str | Sequence[str] | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    guidance_interval: Sequence[float] | None
    feature_reuse: int | None
    feature_reuse_order: int | None
    output_reuse: int | None
    seed: int | Sequence[int] | np.ndarray | None
    rng: str | None
    num_images_per_prompt: int | None
    size: str | Sequence[int] | None
    image: ImageLike | None
    image_latents: ArrayLike | None
    strength: float | None
    mask_image: ImageLike | None
    depth_map: ImageLike | None
    control_image: ImageLike | Sequence[ImageLike] | None
    controlnet: str | Sequence[str] | None
    controlnet_conditioning_scale: float | Sequence[float] | None
    control_guidance_start: float | Sequence[float] | None
    control_guidance_end: float | Sequence[float] | None
    guess_mode: bool | None
    adapter_conditioning_scale: float | Sequence[float] | None
    adapter_conditioning_factor: float | None
    ip_adapter_image: ImageLike | Sequence[ImageLike] | None
    ip_adapter_scale: float | Sequence[float] | None
    latents: ArrayLike | None
    prompt_embeds: ArrayLike | None
    negative_prompt_embeds: ArrayLike | None
    pooled_prompt_embeds: ArrayLike | None
    negative_pooled_prompt_embeds: ArrayLike | None
    original_size: Pair
    crops_coords_top_left: Pair
    target_size: Pair
    negative_original_size: Pair
    negative_crops_coords_top_left: Pair
    negative_target_size: Pair
    timesteps: Sequence[float] | np.ndarray | None
    sigmas: Sequence[float] | np.ndarray | None
    eta: float | None
    clip_skip: int | None
    long_prompts: str | None
    weighting: bool | None
    hires_scale: float | None
    hires_size: str | Sequence[int] | None
    hires_steps: int | None
    hires_strength: float | None
    hires_upscaler: str | None
    hires_scheduler: str | None
    hires_prompt: str | Sequence[str] | None
    hires_negative_prompt: str | Sequence[str] | None
    hires_guidance_scale: float | None
    denoising_start: float | None
    denoising_end: float | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    refiner_switch_at: float | None
    callback_on_step_end: Callback | None
    preset: str | None
    height: int | None
    width: int | None
    generator: GeneratorLike | Sequence[GeneratorLike] | None
    callback_on_step_end_tensor_inputs: Sequence[str] | None


# Names that diffusers has and that become options.
DIFFUSERS = ("height", "width", "generator", "callback_on_step_end_tensor_inputs")
# Names that other tools use for an option.
ALIASES = {
    **dict.fromkeys(("steps", "num_steps", "n_steps"), "num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), "guidance_scale"),
    **dict.fromkeys(("resolution", "image_size"), "size"),
    **dict.fromkeys(("mask", "inpaint_mask"), "mask_image"),
    **dict.fromkeys(("num_images", "n", "n_iter", "batch_size"), "num_images_per_prompt"),
    **dict.fromkeys(("init_image", "input_image", "img"), "image"),
    **dict.fromkeys(("denoising_strength", "denoise"), "strength"),
    **dict.fromkeys(("negative", "neg_prompt", "uncond_prompt"), "negative_prompt"),
    **dict.fromkeys(("callback", "callback_steps"), "callback_on_step_end"),
    **dict.fromkeys(("cfg_rescale", "rescale"), "guidance_rescale"),
    **dict.fromkeys(("seeds", "manual_seed"), "seed"),
    **dict.fromkeys(("reuse", "deepcache"), "feature_reuse"),
    **dict.fromkeys(("taylorseer", "max_order"), "feature_reuse_order"),
    **dict.fromkeys(("ucache", "easycache", "teacache", "cache_interval"), "output_reuse"),
    **dict.fromkeys(("depth", "depth_image"), "depth_map"),
    **dict.fromkeys(("hr_scale", "enable_hr", "hires", "upscale"), "hires_scale"),
    **dict.fromkeys(("hr_resize_x", "hr_resize_y"), "hires_size"),
    **dict.fromkeys(("hr_upscaler", "upscaler"), "hires_upscaler"),
    **dict.fromkeys(("hr_sampler_name", "hr_scheduler"), "hires_scheduler"),
    "hr_second_pass_steps": "hires_steps",
    "hr_prompt": "hires_prompt",
    "hr_negative_prompt": "hires_negative_prompt",
    "hr_cfg": "hires_guidance_scale",
    **dict.fromkeys(("refiner_start", "refiner_switch", "high_noise_frac"), "refiner_switch_at"),
    **dict.fromkeys(("controlnet_image", "controlnet_cond", "control"), "control_image"),
    **dict.fromkeys(("control_scale", "conditioning_scale"), "controlnet_conditioning_scale"),
}
# Names of diffusers and others that are not options, and what to do.
_SCHEDULER = 'use pipe.with_scheduler("DPM++ 2M Karras")'
_LORA = 'use pipe.set_lora({"name": 0.8})'
_IP_ADAPTER = "use ip_adapter_image, and ip_adapter_scale"
_PROMPT = "both text encoders of a model get the same prompt"
INSTEAD = {
    "output_type": "pass it to pipe(...); elsewhere images are PIL images",
    "return_dict": "pass it to pipe(...)",
    "progress": "pass it to pipe(...)",
    "prompt_2": _PROMPT,
    "negative_prompt_2": _PROMPT,
    "ip_adapter_image_embeds": _IP_ADAPTER,
    "padding_mask_crop": "crop image and mask_image before the call",
    **dict.fromkeys(("scheduler", "sampler", "sampler_name"), _SCHEDULER),
    **dict.fromkeys(("lora", "loras", "cross_attention_kwargs"), _LORA),
}
OF_A_CALL = ("prompt", "output_type", "return_dict", "on_step", "progress")
CALLBACK_TENSORS = ("latents",)


def merge_arguments(
    options: Mapping[str, Any] | None, arguments: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Options passed as a mapping and by name.

    Raises:
        UsageError: For a name that is in both.
    """
    if options is None or not arguments:
        return arguments if options is None else options
    if not isinstance(options, Mapping):
        raise invalid_argument("options", options, 'a mapping such as {"seed": 3}')
    if twice := sorted(options.keys() & arguments.keys()):
        raise UsageError(f"{twice[0]} is passed twice", hint="pass it in options or by name")
    return {**options, **arguments}


def parse_options(arguments: Mapping[str, Any]) -> GenerationOptions:
    """Validate the named arguments of a call.

    Raises:
        UsageError: For a name that is unknown, or a value that does not fit.
    """
    if not isinstance(arguments, Mapping):
        raise invalid_argument("options", arguments, 'a mapping such as {"seed": 3}')
    for name in arguments:
        if name not in PARSERS and name not in DIFFUSERS and name != "preset":
            raise UsageError(f"unknown option {name!r}", hint=_suggest(str(name)))
    passed = {name: value for name, value in arguments.items() if value is not None}
    if "preset" in passed:
        passed = expand_preset(passed.pop("preset"), passed)
    diffusers = {name: passed.pop(name) for name in DIFFUSERS if name in passed}
    _check_callback_tensors(diffusers.pop("callback_on_step_end_tensor_inputs", None))
    passed |= _size_from_sides(diffusers, passed)
    generator = diffusers.get("generator")
    if generator is None:
        return GenerationOptions(**passed)
    if "seed" in passed:
        raise UsageError("both seed and generator", hint="pass one of them")
    options = GenerationOptions(**passed)  # validated before the generator is advanced
    seed, rng = seed_from_generator(generator)
    if rng and passed.get("rng", rng) != rng:
        raise UsageError(f"rng is {options.rng}, but generator is on {rng}", hint="leave rng out")
    return replace(options, seed=seed, rng=rng or options.rng)


def _suggest(name: str) -> str:
    """What to write instead of a name that is not an option."""
    if name in INSTEAD:
        return INSTEAD[name]
    names = [*PARSERS, *DIFFUSERS, "preset", *OF_A_CALL, *ALIASES]
    similar = [name.casefold(), *difflib.get_close_matches(name.casefold(), names, n=1)]
    meant = next((entry for entry in similar if entry in names), None)
    if meant is None:
        return "see help(sdrt.GenerationOptions) for all options"
    return f"did you mean {ALIASES.get(meant, meant)}?"


def _size_from_sides(sides: Mapping[str, Any], passed: Mapping[str, Any]) -> dict[str, Any]:
    """The option `size` of `height` and `width`."""
    names = [name for name in ("height", "width") if name in sides]
    if not names:
        return {}
    if "size" in passed:
        raise UsageError(f"both size and {names[0]}", hint="pass one of them")
    if len(names) == 1:
        raise UsageError(f"{names[0]} alone", hint="pass both height and width")
    return {"size": [int_parser(1, 99_999)(name, sides[name]) for name in ("width", "height")]}


def _check_callback_tensors(names: object) -> None:
    """Raise UsageError for tensors that a callback does not get."""
    if names is None:
        return
    if not isinstance(names, list | tuple) or not {*map(str, names)} <= {*CALLBACK_TENSORS}:
        raise invalid_argument(
            "callback_on_step_end_tensor_inputs",
            names,
            '["latents"]',
            "a callback gets the latents alone",
        )
