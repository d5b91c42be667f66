"""What a call of the pipeline may be asked for, and what of it is refused."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL.Image import Image

from sdrt.errors import UsageError

from .images import MAX_SIDE
from .noise import STREAMS
from .parsing import (
    Parser,
    choice_parser,
    float_parser,
    int_parser,
    invalid_argument,
    parse_array,
    parse_callable,
    parse_depth_map,
    parse_flag,
    parse_image,
    parse_interval,
    parse_size_option,
    parse_texts,
    seed_parser,
    sequence_parser,
)

MAX_STEPS = 1000
MAX_IMAGES = 1000
MAX_GUIDANCE = 100.0
MAX_REUSE = 100  # evaluations of which one is full
LONG_PROMPTS = ("chunk", "cut")
Seed = int | Sequence[int] | None
Pair = tuple[int, int] | None
SIZE_OPTIONS = ("original_size", "crops_coords_top_left", "target_size")
SIZES_IN_TEXT = {
    f"{side} {name}".strip().capitalize(): f"{side}_{option}".strip("_")
    for side in ("", "negative")
    for name, option in zip(("original size", "crop", "target size"), SIZE_OPTIONS, strict=True)
}
GIVEN_IN_TEXT = {
    "Mask": "mask_image",
    "Depth map": "depth_map",
    "Latents": "latents",
    "Prompt embeds": "prompt_embeds",
    "Negative prompt embeds": "negative_prompt_embeds",
    "Callback": "callback_on_step_end",
}
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The named arguments of a call, under the reference library's names where it has them.

    None is an option's default. Numbers may be NumPy's, or floats where a whole number is meant
    (20.0); arrays may be tensors of other libraries. Raises UsageError for a value that does not
    fit, with the option's name, what was found and what was expected.

    negative_prompt: what the images are steered away from; of a list, one for each prompt
    num_inference_steps: steps of the sampler; some cost two evaluations
    guidance_scale: to 100; there is no guidance from 0 to 1
    guidance_rescale: 0 to 1, Lin et al. 2023 (arXiv:2305.08891), eq. 16
    guidance_interval: shares of the run within which guidance acts; outside it the unguided row is
        not computed (Kynkaanniemi et al. 2024, arXiv:2404.07724)
    feature_reuse: every so many evaluations run the whole model, the others its shallow part with
        what the deep one made last; 1 is all (Ma et al. 2023, arXiv:2312.00858). For bundles built
        for it
    seed: of the first picture, the next ones count on from it; or one each; None draws one
    rng: whose noise a seed gives, torch's on "cpu" or on "cuda"
    num_images_per_prompt: pictures of every prompt
    size: "WIDTHxHEIGHT" or (width, height); None is the bundle's first. Others than the bundle's
        are unproven, and what is larger than those goes through the autoencoder in tiles
    image, strength: an image to start from, and the share of the run that it goes through; None
        is 0.8, with a mask 1. At 0 the image itself comes back, in the size asked for
    mask_image: light where the image is to be made new, of the image's size
    depth_map: for models that take one: near is light
        All three are PIL images of any mode, paths, or arrays: [H, W], [H, W, C] or, as tensors,
        [C, H, W], integers from 0 to 255 or floats from 0 to 1 (depth: any floats)
    latents: [B, C, H/8, W/8] starting noise of unit variance instead of the seeds'
    prompt_embeds, negative_prompt_embeds: [B or 1, tokens, width] instead of prompts
    pooled_prompt_embeds, negative_pooled_prompt_embeds: [B or 1, width] with them, for models that
        are told of the prompt as a whole
    original_size, crops_coords_top_left, target_size: (height, width), (top, left), (height, width)
        for models that are told of sizes: the picture's before it was cut, what was cut, and the
        wanted one's; None is the size made, (0, 0) and the size made
    negative_original_size, negative_crops_coords_top_left, negative_target_size: the same for what
        is steered away from; None is as above
    timesteps, sigmas: rungs instead of the scheduler's own
    clip_skip: layers of the text encoder left out, from its end
    long_prompts: "chunk" reads on in another stretch, "cut" stops and warns
    weighting: whether brackets in prompts mean attention
    callback_on_step_end: called as (pipeline, evaluation, timestep, {"latents": ..}) after every
        evaluation; latents in a returned mapping replace the batch's
    """

    negative_prompt: str | Sequence[str] = ""
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    feature_reuse: int = 1
    seed: Seed = None
    rng: str = "cpu"
    num_images_per_prompt: int = 1
    size: str | None = None
    image: Image | None = None
    strength: float | None = None
    mask_image: Image | None = None
    depth_map: Image | None = None
    latents: np.ndarray | None = field(default=None, compare=False)
    prompt_embeds: np.ndarray | None = field(default=None, compare=False)
    negative_prompt_embeds: np.ndarray | None = field(default=None, compare=False)
    pooled_prompt_embeds: np.ndarray | None = field(default=None, compare=False)
    negative_pooled_prompt_embeds: np.ndarray | None = field(default=None, compare=False)
    original_size: Pair = None
    crops_coords_top_left: Pair = None
    target_size: Pair = None
    negative_original_size: Pair = None
    negative_crops_coords_top_left: Pair = None
    negative_target_size: Pair = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    clip_skip: int = 0
    long_prompts: str = "chunk"
    weighting: bool = True
    callback_on_step_end: Callback | None = None

    def __post_init__(self) -> None:
        """Every value in its own type; raises UsageError for one that does not fit."""
        for name, parse in PARSERS.items():
            value = getattr(self, name)
            parsed = DEFAULTS[name] if value is None else parse(name, value)
            object.__setattr__(self, name, parsed)
        _check_together(self)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def num_skipped_steps(self) -> int:
        """Steps that a picture to start from leaves out, as the reference library counts them."""
        if self.image is None:
            return 0
        if self.returns_image:
            return self.num_inference_steps - 1
        return self.num_inference_steps - int(self.num_inference_steps * self.effective_strength)

    @property
    def effective_strength(self) -> float:
        """The share of the run that a picture to start from goes through."""
        if self.strength is not None:
            return self.strength
        return 0.8 if self.mask_image is None else 1.0

    @property
    def returns_image(self) -> bool:
        """Whether the given image comes back as it is: nothing of it is changed."""
        return self.image is not None and self.effective_strength == 0.0

    @property
    def nondefault_settings(self) -> dict[str, str]:
        """What an image's text says only where it was asked for, under the names of other tools
        where they have one. Of what a text cannot hold it says that it was given.
        """
        low, high = self.guidance_interval
        asked = {
            "Denoising strength": self.image is not None and format_number(self.effective_strength),
            "Clip skip": self.clip_skip and self.clip_skip + 1,  # others count the last layer too
            "CFG rescale": self.guidance_rescale and format_number(self.guidance_rescale),
            "CFG interval": (low, high) != (0.0, 1.0)
            and f"{format_number(low)}:{format_number(high)}",
            "Feature reuse": self.feature_reuse > 1 and self.feature_reuse,
            "Long prompts": self.long_prompts != "chunk" and self.long_prompts,
            "Emphasis": not self.weighting and "None",
            **{name: _across(getattr(self, option)) for name, option in SIZES_IN_TEXT.items()},
            **{name: _row(getattr(self, name.lower())) for name in ("Timesteps", "Sigmas")},
        }
        given = {
            name: "given"
            for name, option in GIVEN_IN_TEXT.items()
            if getattr(self, option) is not None
        }
        return {name: str(value) for name, value in asked.items() if value} | given


def format_number(value: float) -> str:
    """A number with no more digits than give it again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _across(pair: Pair) -> str:
    """(down, across) -> "ACROSSxDOWN", as sizes are written; nothing for None."""
    return f"{pair[1]}x{pair[0]}" if pair else ""


def _row(values: Sequence[float] | None) -> str:
    return " ".join(format_number(value) for value in values or ())


def parse_options(arguments: Mapping[str, Any]) -> GenerationOptions:
    """Checked options; raises UsageError for an unknown name or a value that does not fit."""
    if not isinstance(arguments, Mapping):
        raise invalid_argument("options", arguments, 'a mapping such as {"seed": 3}')
    for name in arguments:
        if name not in PARSERS:
            raise UsageError(f"a call takes no {name!r}{_hint(str(name))}")
    return GenerationOptions(**arguments)


def _hint(name: str) -> str:
    """What to write instead of a name that is not an option's."""
    if name in INSTEAD:
        return f"; {INSTEAD[name]}"
    near = difflib.get_close_matches(name, PARSERS, n=1)
    wanted = ALIASES.get(name.casefold()) or (near[0] if near else None)
    return f"; did you mean {wanted}?" if wanted else f"; one of {', '.join(PARSERS)}"


def _check_together(options: GenerationOptions) -> None:
    """Raise UsageError for options that do not go together."""
    if options.image is None:
        for name in ("mask_image", "strength"):
            if getattr(options, name) is not None:
                raise UsageError(f"{name} requires image", hint="pass the image to start from")
    if any(options.negative_prompt) and options.negative_prompt_embeds is not None:
        raise UsageError("both negative_prompt and negative_prompt_embeds", hint="pass one of them")
    if options.image is not None:
        if options.latents is not None:
            raise UsageError("both image and latents", hint="a run starts from one of them")
        if options.timesteps is not None or options.sigmas is not None:
            raise UsageError(
                "image with timesteps or sigmas", hint="strength decides where the run starts"
            )
        steps, strength = options.num_inference_steps, options.effective_strength
        if not options.returns_image and int(steps * strength) < 1:
            raise UsageError(
                f"strength {strength:g} of {steps} steps is less than one step",
                hint="raise either of them",
            )


PAIR = sequence_parser(int_parser(0, MAX_SIDE), f"two whole numbers from 0 to {MAX_SIDE}", length=2)
RUNGS = sequence_parser(float_parser(0.0, 1e6), "a list of numbers that fall")
PARSERS: dict[str, Parser[Any]] = {
    "negative_prompt": parse_texts,
    "num_inference_steps": int_parser(1, MAX_STEPS),
    "guidance_scale": float_parser(0.0, MAX_GUIDANCE),
    "guidance_rescale": float_parser(0.0, 1.0),
    "guidance_interval": parse_interval,
    "feature_reuse": int_parser(1, MAX_REUSE),
    "seed": seed_parser(2**64),
    "rng": choice_parser(*STREAMS),
    "num_images_per_prompt": int_parser(1, MAX_IMAGES),
    "size": parse_size_option,
    "image": parse_image,
    "strength": float_parser(0.0, 1.0),
    "mask_image": parse_image,
    "depth_map": parse_depth_map,
    "latents": parse_array,
    "prompt_embeds": parse_array,
    "negative_prompt_embeds": parse_array,
    "pooled_prompt_embeds": parse_array,
    "negative_pooled_prompt_embeds": parse_array,
    **dict.fromkeys((*SIZE_OPTIONS, *(f"negative_{name}" for name in SIZE_OPTIONS)), PAIR),
    "timesteps": RUNGS,
    "sigmas": RUNGS,
    "clip_skip": int_parser(0, 100),
    "long_prompts": choice_parser(*LONG_PROMPTS),
    "weighting": parse_flag,
    "callback_on_step_end": parse_callable,
}
DEFAULTS = {each.name: each.default for each in fields(GenerationOptions)}
# Names that other tools use for an option.
ALIASES = {
    **dict.fromkeys(("steps", "num_steps", "n_steps"), "num_inference_steps"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "scale"), "guidance_scale"),
    **dict.fromkeys(("width", "height", "resolution", "image_size"), "size"),
    **dict.fromkeys(("mask", "inpaint_mask"), "mask_image"),
    **dict.fromkeys(("num_images", "n", "n_iter", "batch_size"), "num_images_per_prompt"),
    **dict.fromkeys(("init_image", "input_image", "img"), "image"),
    **dict.fromkeys(("denoising_strength", "denoise"), "strength"),
    **dict.fromkeys(("negative", "neg_prompt", "uncond_prompt"), "negative_prompt"),
    **dict.fromkeys(("callback", "callback_steps"), "callback_on_step_end"),
    **dict.fromkeys(("cfg_rescale", "rescale"), "guidance_rescale"),
    **dict.fromkeys(("seeds", "manual_seed"), "seed"),
    **dict.fromkeys(("reuse", "deepcache"), "feature_reuse"),
    **dict.fromkeys(("depth", "depth_image"), "depth_map"),
}
# Names of the reference library that have no option here, and what to do instead.
SAMPLER = 'use pipe.with_scheduler("DPM++ 2M Karras")'
INSTEAD = {
    "generator": "use seed=3, or a list with one seed for each image",
    "output_type": "leave it out: the result's images are PIL images",
    "return_dict": "leave it out: the result has images, seeds and parameters",
    "eta": 'use pipe.with_scheduler({**pipe.scheduler_config, "eta": 0.5})',
    **dict.fromkeys(("scheduler", "sampler", "sampler_name"), SAMPLER),
    **dict.fromkeys(("lora", "loras"), 'use pipe.set_lora({"name": 0.8})'),
}
