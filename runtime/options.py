"""What a call of the pipeline may be asked for, and what of it is refused."""

import difflib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL.Image import Image

from sdrt.errors import UsageError

from .noise import STREAMS
from .pictures import MOST_SIDE

MOST_IMAGES = 1000
MOST_GUIDANCE = 100.0
MOST_REUSE = 100  # evaluations of which one is full
LONG_PROMPTS = ("chunk", "cut")
Seed = int | Sequence[int] | None
Pair = tuple[int, int] | None
SIZES = ("original_size", "crops_coords_top_left", "target_size")
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Options:
    """The named arguments of a call, under the reference library's names where it has them.

    negative_prompt: what the pictures are steered away from
    num_inference_steps: steps of the sampler; some cost two evaluations
    guidance_scale: 1 is none, to 100
    guidance_rescale: 0 to 1, Lin et al. 2023 (arXiv:2305.08891), eq. 16
    guidance_interval: shares of the run within which guidance acts; outside it the unguided row is
        not computed (Kynkaanniemi et al. 2024, arXiv:2404.07724)
    feature_reuse: every so many evaluations run the whole model, the others its shallow part with
        what the deep one made last; 1 is all (Ma et al. 2023, arXiv:2312.00858). For bundles built
        for it
    seed: of the first picture, the next ones count on from it; or one each; None draws one
    rng: whose noise a seed gives, torch's on "cpu" or on "cuda"
    num_images_per_prompt: pictures of every prompt
    size: "WIDTHxHEIGHT"; None is the bundle's first. Others than the bundle's are unproven, and
        what is larger than those goes through the autoencoder in tiles
    image, strength: a picture to start from, and the share of the run that it goes through; None
        is 0.8, with a mask 1
    mask_image: light where the picture is to be made new, of the picture's size
    depth_map: for models that take one: near is light
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

    negative_prompt: str = ""
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

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def skipped(self) -> int:
        """Steps that a picture to start from leaves out, as the reference library counts them."""
        if self.image is None:
            return 0
        return self.num_inference_steps - int(self.num_inference_steps * self.share)

    @property
    def share(self) -> float:
        """The share of the run that a picture to start from goes through."""
        if self.strength is not None:
            return self.strength
        return 0.8 if self.mask_image is None else 1.0

    @property
    def unusual(self) -> dict[str, object]:
        """What a picture's text says only where it was asked for, under the names of other tools
        where they have one.
        """
        asked = {
            "Denoising strength": self.image is not None and f"{self.share:g}",
            "Clip skip": self.clip_skip and self.clip_skip + 1,  # others count the last layer too
            "CFG rescale": self.guidance_rescale and f"{self.guidance_rescale:g}",
            "Feature reuse": self.feature_reuse > 1 and self.feature_reuse,
        }
        return {name: value for name, value in asked.items() if value}


def options_from(arguments: Mapping[str, Any]) -> Options:
    """Checked options; raises UsageError for an unknown name or a value out of range."""
    names = [each.name for each in fields(Options)]
    for name in arguments:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; one of {', '.join(names)}"
            raise UsageError(f"a call takes no {name!r}{hint}")
    options = Options(**arguments)
    _check_numbers(options)
    _check_inputs(options)
    return options


def _check_numbers(options: Options) -> None:
    low, high = options.guidance_interval
    for name, value, least, most in (
        ("guidance scale", options.guidance_scale, 1.0, MOST_GUIDANCE),
        ("guidance_rescale", options.guidance_rescale, 0.0, 1.0),
        ("guidance_interval", low, 0.0, high),
        ("guidance_interval", high, low, 1.0),
        ("strength", options.share, 0.0, 1.0),
        ("clip_skip", options.clip_skip, 0, 100),
    ):
        if not (isinstance(value, int | float) and math.isfinite(value) and least <= value <= most):
            raise UsageError(f"{name} {value!r}; expected {least:g} to {most:g}")


def _check_inputs(options: Options) -> None:
    reuse = options.feature_reuse
    if isinstance(reuse, bool) or not isinstance(reuse, int) or not 1 <= reuse <= MOST_REUSE:
        raise UsageError(f"feature_reuse {reuse!r}; expected a whole number from 1 to {MOST_REUSE}")
    for name, value, allowed in (
        ("rng", options.rng, tuple(STREAMS)),
        ("long_prompts", options.long_prompts, LONG_PROMPTS),
    ):
        if value not in allowed:
            raise UsageError(f"{name} {value!r}; expected {' or '.join(allowed)}")
    for name in (*SIZES, *(f"negative_{each}" for each in SIZES)):
        pair = getattr(options, name)
        if pair is not None and not (
            len(pair) == 2 and all(isinstance(n, int) and 0 <= n <= MOST_SIDE for n in pair)
        ):
            raise UsageError(f"{name} {pair!r}; expected two whole numbers from 0 to {MOST_SIDE}")
    if options.mask_image is not None and options.image is None:
        raise UsageError("a mask without a picture; give image too")
    if options.image is not None:
        if options.latents is not None:
            raise UsageError("image and latents both; a run begins at one of them")
        if options.timesteps is not None or options.sigmas is not None:
            raise UsageError("image with timesteps or sigmas; strength decides where it begins")
        if int(options.num_inference_steps * options.share) < 1:
            raise UsageError(
                f"strength {options.share:g} of {options.num_inference_steps} steps is less "
                "than one step; raise either"
            )


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to make; `index` is its place among all of the call, `prompt_index` its
    prompt's.
    """

    index: int
    prompt_index: int
    prompt: str
    seed: int


def requests_from(prompt: str | Sequence[str] | None, options: Options) -> list[Request]:
    """Every picture of a call; raises UsageError for counts and seeds that do not fit."""
    if prompt is None and options.prompt_embeds is None:
        raise UsageError("no prompt; give one, or prompt_embeds")
    if prompt is not None and options.prompt_embeds is not None:
        raise UsageError("a prompt and prompt_embeds both; give one of them")
    if options.prompt_embeds is not None:
        prompts = [""] * len(options.prompt_embeds)
    else:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    each = options.num_images_per_prompt
    total = len(prompts) * each if isinstance(each, int) else 0
    if isinstance(each, bool) or not 1 <= total <= MOST_IMAGES:
        raise UsageError(
            f"{each!r} images of {len(prompts)} prompts; expected 1 to {MOST_IMAGES} in all"
        )
    seeds = _seeds(options.seed, total)
    return [Request(i, i // each, prompts[i // each], seed) for i, seed in enumerate(seeds)]


def requests_without_prompt(prompt: object, options: Options) -> list[Request]:
    """Every picture of a call of a model that is told nothing; raises UsageError for what it
    cannot be told.
    """
    given = {
        "prompt": prompt not in (None, []),
        "negative_prompt": bool(options.negative_prompt),
        **{
            name: getattr(options, name) is not None
            for name in (
                *("prompt_embeds", "negative_prompt_embeds", "image", "mask_image", "depth_map"),
                *("original_size", "crops_coords_top_left", "target_size"),
            )
        },
        "clip_skip": bool(options.clip_skip),
    }
    if named := [name for name, is_given in given.items() if is_given]:
        raise UsageError(
            f"this model takes no {named[0]}: it draws what it was trained on, told nothing; "
            "type sdrt run without it"
        )
    return requests_from("", options)


def _seeds(seed: Seed, total: int) -> list[int]:
    if seed is None:
        seed = secrets.randbelow(2**32)
    seeds = [seed + i for i in range(total)] if isinstance(seed, int) else list(seed)
    if len(seeds) != total:
        raise UsageError(f"{len(seeds)} seeds for {total} pictures; give one each, or one in all")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            raise UsageError(f"seed {value!r}; expected a whole number from 0 to 2**64 - 1")
    return seeds
