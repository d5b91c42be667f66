"""A call of the pipeline after validation: everything that is known before anything is computed.

Knows options, sampler tables and the manifest's sizes; not engines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdrt.bundle import parse_size
from sdrt.bundle.manifest import Manifest
from sdrt.errors import UsageError

from .denoising import Guidance, Step
from .options import GenerationOptions
from .requests import Request
from .samplers.registry import sampler_name
from .samplers.table import SamplerTable, sampler_table
from .upscaling import Upscaler

ETA_SCHEDULERS = ("DDIMScheduler", "TCDScheduler")


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """A validated call. `dataclasses.replace` gives one of fewer requests.

    Attributes:
        requests: The images to generate.
        options: The call's options.
        scheduler_config: Of the sampler.
        table: The sampler's numbers.
        guidance: The guidance scale of every evaluation.
        size: (width, height) in pixels.
        max_batch: How many images are generated together at most.
        hires: The pass at a higher resolution that follows; None for none.
        evaluations_before: Of the pass that this one follows.
    """

    requests: Sequence[Request]
    options: GenerationOptions
    scheduler_config: Mapping[str, Any]
    table: SamplerTable
    guidance: Guidance
    size: tuple[int, int]
    max_batch: int
    hires: "HiresPass | None" = None
    evaluations_before: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the model's batch for each image, at most."""
        return int(self.guidance.num_rows.max())

    @property
    def total_evaluations(self) -> int:
        """Of all passes."""
        after = self.hires.job.table.evaluations if self.hires else 0
        return self.evaluations_before + self.table.evaluations + after

    def place_step(self, step: Step) -> Step:
        """A step of this pass, counted over all passes."""
        index = self.evaluations_before + step.index
        return replace(step, index=index, total=self.total_evaluations)


@dataclass(frozen=True, slots=True)
class HiresPass:
    """A validated second pass.

    Attributes:
        job: Its call, without requests.
        num_steps: Steps that it runs.
        upscaler: Enlarges the first pass's result.
        upscaled_size: (width, height) before the crop.
        prompts: One for each prompt of the call; None where the first pass's stay.
        negative_prompts: The same.
    """

    job: GenerationJob
    num_steps: int
    upscaler: Upscaler
    upscaled_size: tuple[int, int]
    prompts: Sequence[str] | None
    negative_prompts: Sequence[str] | None

    def get_request(self, request: Request) -> Request:
        """What an image is conditioned on in this pass."""
        index = request.prompt_index
        prompt = request.prompt if self.prompts is None else self.prompts[index]
        negative = self.negative_prompts
        negative_prompt = request.negative_prompt if negative is None else negative[index]
        return replace(request, prompt=prompt, negative_prompt=negative_prompt)


def parse_output_size(manifest: Manifest, options: GenerationOptions) -> tuple[int, int]:
    """(width, height) of a call's images; raises UsageError for a size that the model cannot
    generate.
    """
    sizes, multiple = manifest.sizes, manifest.multiple
    size = parse_size(options.size) if options.size else sizes[0]
    if size not in sizes and any(side % multiple for side in size):
        available = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise UsageError(
            f"size {size[0]}x{size[1]} is not in this bundle, which has {available}",
            hint=f"pass one of these, or multiples of {multiple}",
        )
    return size


def apply_eta(scheduler_config: Mapping[str, Any], options: GenerationOptions) -> Mapping[str, Any]:
    """The scheduler's configuration with a call's eta.

    diffusers passes eta to the schedulers that read it, and ignores it for others.

    Raises:
        UsageError: For an eta above 0 that the scheduler does not read.
    """
    name = sampler_name(scheduler_config)
    if name in ETA_SCHEDULERS and options.eta is not None:
        return {**scheduler_config, "eta": options.eta}
    if options.eta:
        raise UsageError(f"eta is unsupported by {name}", hint=f"use {' or '.join(ETA_SCHEDULERS)}")
    return scheduler_config


def build_table(
    scheduler_config: Mapping[str, Any],
    options: GenerationOptions,
    skipped_steps: int | None = None,
) -> SamplerTable:
    """The sampler's table of a call.

    skipped_steps: of a pass that starts from latents; None where the options say all
    """
    if skipped_steps is not None:
        steps = options.num_inference_steps
        return sampler_table(scheduler_config, steps, denoise_from=skipped_steps, image=True)
    # With a mask and full strength nothing of the image is left at the start.
    replaced = options.mask_image is not None and options.effective_strength == 1.0
    return sampler_table(
        scheduler_config,
        options.num_inference_steps,
        timesteps=options.timesteps,
        sigmas=options.sigmas,
        denoise_from=options.num_skipped_steps,
        image=options.image is not None and not replaced,
    )


def build_guidance(
    options: GenerationOptions, num_evaluations: int, *, has_negative_row: bool
) -> Guidance:
    """The guidance of a call: 1 outside `guidance_interval`.

    Args:
        options: Of the call.
        num_evaluations: Of its sampler's table.
        has_negative_row: Whether guidance is by a second row of the model's batch.
    """
    progress = np.arange(num_evaluations) / num_evaluations  # [N] in [0, 1)
    low, high = options.guidance_interval
    inside = (progress >= low) & ((progress < high) | (high >= 1.0))
    scale = options.guidance_scale if options.guided and has_negative_row else 1.0
    return Guidance(np.where(inside, scale, 1.0), options.guidance_rescale)
