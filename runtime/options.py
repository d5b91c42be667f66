"""The options of a call, their values and which go together.

Knows values; not models, which decide further.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL.Image import Image

from sdrt.errors import UsageError

from .hires_options import DEFAULT_UPSCALER, HIRES_PARSERS, check_hires
from .images import MAX_SIDE
from .noise import STREAMS
from .parsing import (
    Parser,
    choice_parser,
    float_parser,
    int_parser,
    numbers_parser,
    parse_array,
    parse_callable,
    parse_depth_map,
    parse_flag,
    parse_image,
    parse_images,
    parse_interval,
    parse_names,
    parse_size_option,
    parse_texts,
    seed_parser,
    sequence_parser,
)
from .refiner_options import REFINER_PARSERS, check_refiner, is_latents, parse_image_latents

MAX_STEPS = 1000
MAX_IMAGES = 1000
MAX_GUIDANCE = 100.0
MAX_CONTROL_SCALE = 10.0
MAX_REUSE = 100  # evaluations of which one is full
MAX_REUSE_ORDER = 1  # images of the second order are further from the full run's than of the first
LONG_PROMPTS = ("chunk", "cut")
Seed = int | Sequence[int] | None
Pair = tuple[int, int] | None
SIZE_OPTIONS = ("original_size", "crops_coords_top_left", "target_size")
SIZES_IN_TEXT = {
    f"{side} {name}".strip().capitalize(): f"{side}_{option}".strip("_")
    for side in ("", "negative")
    for name, option in zip(("original size", "crop", "target size"), SIZE_OPTIONS, strict=True)
}
PASSED_IN_TEXT = {
    "Mask": "mask_image",
    "Depth map": "depth_map",
    "Latents": "latents",
    "Image latents": "image_latents",
    "Prompt embeds": "prompt_embeds",
    "Negative prompt embeds": "negative_prompt_embeds",
    "Callback": "callback_on_step_end",
}
PARTS_IN_TEXT = {
    "Denoising start": "denoising_start",
    "Denoising end": "denoising_end",
    "Aesthetic score": "aesthetic_score",
    "Negative aesthetic score": "negative_aesthetic_score",
}
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The options of a call, under diffusers' names where it has them.

    None is an option's default. Numbers may be NumPy's, or floats where an integer is meant (20.0).
    Arrays may be tensors of other libraries. Images may be PIL images of any mode, paths or arrays:
    [H, W], [H, W, C] or, as tensors, [C, H, W], integers from 0 to 255 or floats from 0 to 1.

    Attributes:
        negative_prompt: What the images are steered away from; a list has one for each prompt.
        num_inference_steps: Steps of the sampler; some samplers evaluate the model twice a step.
        guidance_scale: 0 to 100; from 0 to 1 there is no guidance.
        guidance_rescale: 0 to 1; Lin et al. 2023 (arXiv:2305.08891), eq. 16.
        guidance_interval: The part of the run with guidance, from 0 to 1. Outside it the negative
            row is not computed; Kynkaanniemi et al. 2024 (arXiv:2404.07724).
        feature_reuse: One of so many evaluations runs the full model, the others its shallow layers
            with the last deep feature; Ma et al. 2023 (arXiv:2312.00858). Needs a bundle that was
            built for it.
        feature_reuse_order: 0 takes that feature as it is; 1 extrapolates it from the last two, as
            TaylorSeer does; Liu et al. 2025 (arXiv:2503.06923).
        output_reuse: Only one of every N evaluations is computed (the second after half that
            interval); the outputs of the others are extrapolated from the last two computed, as in
            TaylorSeer. Only for samplers that add no noise.
        seed: Of the first image, the next ones count on; or one for each image. None is random.
        rng: Whose noise a seed has: torch's on "cpu" or on "cuda".
        num_images_per_prompt: Images of every prompt.
        size: "WIDTHxHEIGHT" or (width, height); None is the bundle's first. Others than the
            bundle's are not validated, and larger ones go through the autoencoder in tiles.
        image: The image to start from. An array [B, 4, H, W] of floats is `image_latents`.
        image_latents: [B or 1, C, H/8, W/8], instead of `image`: the latents of an encoded image,
            or with `denoising_start` those of another call with `output_type="latent"`.
        strength: How far the run changes `image`, 0 to 1; None is 0.8, with a mask 1. At 0 the
            image itself is returned, in the call's size.
        mask_image: Light in the area to replace, in the size of `image`.
        depth_map: For depth models; near is light, floats have any range.
        control_image: What each ControlNet or T2I-Adapter reads, one image or one for each net,
            in their order; resized to the call's size.
        controlnet: Names of the loaded nets that this call uses; None is all of them.
        controlnet_conditioning_scale: Of the nets' residuals, -10 to 10; one or one for each net.
        control_guidance_start: The part of the run at which a net begins, 0 to 1; one or one for
            each net.
        control_guidance_end: The part of the run at which a net stops; the same.
        guess_mode: Whether ControlNets steer the prompt's row alone, so that they act without a
            prompt too.
        adapter_conditioning_scale: Of T2I-Adapters, instead of `controlnet_conditioning_scale`.
        adapter_conditioning_factor: Of T2I-Adapters, instead of `control_guidance_end`.
        ip_adapter_image: The image prompt, for an IP-Adapter; of several images the tokens follow
            each other.
        ip_adapter_scale: Of the image prompt, 0 to 10; one, or one for each cross-attention layer
            in the order of diffusers: the way down, the way up, the middle.
        latents: [B, C, H/8, W/8] starting noise of unit variance, instead of the seeds'.
        prompt_embeds: [B or 1, tokens, width], instead of prompts.
        negative_prompt_embeds: The same, instead of negative prompts.
        pooled_prompt_embeds: [B or 1, width], with `prompt_embeds` for models such as SDXL.
        negative_pooled_prompt_embeds: The same, with `negative_prompt_embeds`.
        original_size: (height, width) of the image before it was cropped, for models such as SDXL;
            None is the image's size.
        crops_coords_top_left: (top, left) of the crop; None is (0, 0).
        target_size: (height, width) of the target; None is the image's size.
        negative_original_size: The same for what is steered away from; None is as above.
        negative_crops_coords_top_left: The same.
        negative_target_size: The same.
        timesteps: Instead of the scheduler's.
        sigmas: Instead of the scheduler's.
        eta: Noise of the samplers that diffusers passes it to, 0 (DDIM) to 1 (DDPM); None is the
            scheduler configuration's.
        clip_skip: Layers to leave out at the text encoder's end.
        long_prompts: "chunk" goes on in another chunk of 75 tokens, "cut" cuts off and warns.
        weighting: Whether brackets in prompts are weights.
        hires_scale: A second pass, as A1111's hires fix: the image is enlarged by so much and goes
            through the model again; 1 to 8. Only for runs from noise.
        hires_size: Instead, "WIDTHxHEIGHT" or (width, height). One side may be 0 and follows from
            the other; with both, the enlarged image is cropped.
        hires_steps: Steps that the second pass runs; 0 is as many as the first.
        hires_strength: How far it changes the image, above 0 to 1.
        hires_upscaler: "Latent" and its variants enlarge the latents; "Lanczos", "Nearest" or the
            name of an upscaler's bundle the decoded image.
        hires_scheduler: Its sampler's name, as for `Pipeline.with_scheduler`; None is the first's.
        hires_prompt: Of the second pass; None is the first's.
        hires_negative_prompt: The same.
        hires_guidance_scale: The same.
        denoising_start: The fraction of the run that another model has done: this one takes over
            the noisy latents in `image` and adds no noise. Above 0, below 1.
        denoising_end: The fraction at which the run stops, for another model to go on from its
            latents; they are those of `output_type="latent"`.
        aesthetic_score: That a refiner is conditioned on; None is 6.
        negative_aesthetic_score: The same for what is steered away from; None is 2.5.
        refiner_switch_at: The fraction of the run after which the refiner of `sdrt.load` takes
            over; None is a run without it.
        callback_on_step_end: Called as (pipeline, index, timestep, {"latents": ...}) after every
            evaluation; latents in a returned mapping replace the batch's.

    Raises:
        UsageError: For a value that does not fit, with the option's name, what was found and what
            was expected.
    """

    negative_prompt: str | Sequence[str] = ""
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    feature_reuse: int = 1
    feature_reuse_order: int = 0
    output_reuse: int = 1
    seed: Seed = None
    rng: str = "cpu"
    num_images_per_prompt: int = 1
    size: str | None = None
    image: Image | None = None
    image_latents: np.ndarray | None = field(default=None, compare=False)
    strength: float | None = None
    mask_image: Image | None = None
    depth_map: Image | None = None
    control_image: Sequence[Image] | None = None
    controlnet: Sequence[str] | None = None
    controlnet_conditioning_scale: float | Sequence[float] = 1.0
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    guess_mode: bool = False
    adapter_conditioning_scale: float | Sequence[float] | None = None
    adapter_conditioning_factor: float | None = None
    ip_adapter_image: Sequence[Image] | None = None
    ip_adapter_scale: float | Sequence[float] = 1.0
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
    eta: float | None = None
    clip_skip: int = 0
    long_prompts: str = "chunk"
    weighting: bool = True
    hires_scale: float | None = None
    hires_size: Pair = None
    hires_steps: int = 0
    hires_strength: float = 0.7
    hires_upscaler: str = DEFAULT_UPSCALER
    hires_scheduler: str | None = None
    hires_prompt: str | Sequence[str] | None = None
    hires_negative_prompt: str | Sequence[str] | None = None
    hires_guidance_scale: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    refiner_switch_at: float | None = None
    callback_on_step_end: Callback | None = None

    def __post_init__(self) -> None:
        """Parse every value; raises UsageError for one that does not fit."""
        if self.image_latents is None and is_latents(self.image):
            object.__setattr__(self, "image_latents", self.image)
            object.__setattr__(self, "image", None)
        for name, parse in PARSERS.items():
            value = getattr(self, name)
            parsed = DEFAULTS[name] if value is None else parse(name, value)
            object.__setattr__(self, name, parsed)
        _check_together(self)
        check_hires(self, DEFAULTS)
        check_refiner(self)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def num_skipped_steps(self) -> int:
        """Steps that a run from an image skips, as diffusers counts them."""
        if not self.starts_from_image or self.denoising_start is not None:
            return 0
        if self.returns_image:
            return self.num_inference_steps - 1
        return self.num_inference_steps - int(self.num_inference_steps * self.effective_strength)

    @property
    def effective_strength(self) -> float:
        """How far the run changes the image that it starts from."""
        if self.strength is not None:
            return self.strength
        return 0.8 if self.mask_image is None else 1.0

    @property
    def starts_from_image(self) -> bool:
        """Whether the run starts from an image or from its latents."""
        return self.image is not None or self.image_latents is not None

    @property
    def has_hires_pass(self) -> bool:
        return self.hires_scale is not None or self.hires_size is not None

    @property
    def returns_image(self) -> bool:
        """Whether the image to start from is the result, unchanged."""
        starts_here = self.denoising_start is None and self.denoising_end is None
        return self.image is not None and starts_here and self.effective_strength == 0.0

    @property
    def nondefault_settings(self) -> dict[str, str]:
        """Options that are not at their defaults, for an image's text, under other tools' names
        where they have one. Arrays and images are only named.
        """
        low, high = self.guidance_interval
        values = {
            "Denoising strength": self.starts_from_image
            and self.denoising_start is None
            and format_number(self.effective_strength),
            "Clip skip": self.clip_skip and self.clip_skip + 1,  # others count the last layer too
            "CFG rescale": self.guidance_rescale and format_number(self.guidance_rescale),
            "CFG interval": (low, high) != (0.0, 1.0)
            and f"{format_number(low)}:{format_number(high)}",
            "IP-Adapter scale": self.ip_adapter_image is not None
            and _format_row(np.atleast_1d(self.ip_adapter_scale).tolist()),
            "Feature reuse": self.feature_reuse > 1 and self.feature_reuse,
            "Feature reuse order": self.feature_reuse > 1 and self.feature_reuse_order,
            "Output reuse": self.output_reuse > 1 and self.output_reuse,
            **{
                name: (value := getattr(self, option)) is not None and format_number(value)
                for name, option in PARTS_IN_TEXT.items()
            },
            "Long prompts": self.long_prompts != "chunk" and self.long_prompts,
            "Emphasis": not self.weighting and "None",
            **{name: _format_size(getattr(self, option)) for name, option in SIZES_IN_TEXT.items()},
            **{name: _format_row(getattr(self, name.lower())) for name in ("Timesteps", "Sigmas")},
        }
        passed = {
            name: "given"
            for name, option in PASSED_IN_TEXT.items()
            if getattr(self, option) is not None
        }
        return {name: str(value) for name, value in values.items() if value} | passed


def format_number(value: float) -> str:
    """A number with the fewest digits that parse to it again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _format_size(pair: Pair) -> str:
    """(height, width) -> "WIDTHxHEIGHT"; empty for None."""
    return f"{pair[1]}x{pair[0]}" if pair else ""


def _format_row(values: Sequence[float] | None) -> str:
    return " ".join(format_number(value) for value in values or ())


def _check_together(options: GenerationOptions) -> None:
    """Raise UsageError for options that do not go together."""
    for name in ("mask_image", "strength"):
        has_image = options.image is not None or (name == "strength" and options.starts_from_image)
        if getattr(options, name) is not None and not has_image:
            raise UsageError(f"{name} requires image", hint="pass the image to start from")
    if options.feature_reuse > 1 and options.output_reuse > 1:
        raise UsageError("both feature_reuse and output_reuse", hint="pass one of them")
    if options.image is not None and options.image_latents is not None:
        raise UsageError("both image and image_latents", hint="pass one of them")
    if any(options.negative_prompt) and options.negative_prompt_embeds is not None:
        raise UsageError("both negative_prompt and negative_prompt_embeds", hint="pass one of them")
    if options.starts_from_image:
        if options.latents is not None:
            raise UsageError("both image and latents", hint="a run starts from one of them")
        if options.timesteps is not None or options.sigmas is not None:
            raise UsageError(
                "image with timesteps or sigmas", hint="strength decides where the run starts"
            )
        steps, strength = options.num_inference_steps, options.effective_strength
        runs = options.returns_image or options.denoising_start is not None
        if not runs and int(steps * strength) < 1:
            raise UsageError(
                f"strength {strength:g} of {steps} steps is less than one step",
                hint="raise either of them",
            )


PAIR = sequence_parser(int_parser(0, MAX_SIDE), f"two integers from 0 to {MAX_SIDE}", length=2)
TIMESTEP_LIST = sequence_parser(float_parser(0.0, 1e6), "a list of descending numbers")
PARSERS: dict[str, Parser[Any]] = {
    "negative_prompt": parse_texts,
    "num_inference_steps": int_parser(1, MAX_STEPS),
    "guidance_scale": float_parser(0.0, MAX_GUIDANCE),
    "guidance_rescale": float_parser(0.0, 1.0),
    "guidance_interval": parse_interval,
    "feature_reuse": int_parser(1, MAX_REUSE),
    "feature_reuse_order": int_parser(0, MAX_REUSE_ORDER),
    "output_reuse": int_parser(1, MAX_REUSE),
    "seed": seed_parser(2**64),
    "rng": choice_parser(*STREAMS),
    "num_images_per_prompt": int_parser(1, MAX_IMAGES),
    "size": parse_size_option,
    "image": parse_image,
    "image_latents": parse_image_latents,
    "strength": float_parser(0.0, 1.0),
    "mask_image": parse_image,
    "depth_map": parse_depth_map,
    "control_image": parse_images,
    "controlnet": parse_names,
    "controlnet_conditioning_scale": numbers_parser(-MAX_CONTROL_SCALE, MAX_CONTROL_SCALE),
    "control_guidance_start": numbers_parser(0.0, 1.0),
    "control_guidance_end": numbers_parser(0.0, 1.0),
    "guess_mode": parse_flag,
    "adapter_conditioning_scale": numbers_parser(-MAX_CONTROL_SCALE, MAX_CONTROL_SCALE),
    "adapter_conditioning_factor": float_parser(0.0, 1.0),
    "ip_adapter_image": parse_images,
    "ip_adapter_scale": numbers_parser(0.0, MAX_CONTROL_SCALE),
    "latents": parse_array,
    "prompt_embeds": parse_array,
    "negative_prompt_embeds": parse_array,
    "pooled_prompt_embeds": parse_array,
    "negative_pooled_prompt_embeds": parse_array,
    **dict.fromkeys((*SIZE_OPTIONS, *(f"negative_{name}" for name in SIZE_OPTIONS)), PAIR),
    "timesteps": TIMESTEP_LIST,
    "sigmas": TIMESTEP_LIST,
    "eta": float_parser(0.0, 1.0),
    "clip_skip": int_parser(0, 100),
    "long_prompts": choice_parser(*LONG_PROMPTS),
    "weighting": parse_flag,
    **HIRES_PARSERS,
    **REFINER_PARSERS,
    "callback_on_step_end": parse_callable,
}
DEFAULTS = {option.name: option.default for option in fields(GenerationOptions)}
