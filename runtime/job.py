"""A call of the pipeline after validation: everything that is known before anything is computed.

Knows options, sampler tables and the manifest's sizes; not engines.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdrt.bundle import parse_size
from sdrt.bundle.manifest import Manifest
from sdrt.errors import UsageError

from .controlnet.unit import ControlUnit
from .deepcache import with_feature_reuse
from .denoising import Guidance, Step
from .lora.rows import LoraFactors
from .options import GenerationOptions
from .output_reuse import check_output_reuse, with_output_reuse
from .prompt_timeline import PromptTimeline, build_prompt_timeline
from .requests import Request
from .samplers.registry import SAMPLERS, sampler_name
from .samplers.table import sampler_table
from .samplers.table_data import SamplerTable
from .textual_inversion.words import EmbeddingSet
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
        prompt_steps: Steps that changing prompts count.
        embeddings: The words of textual inversion that its prompts may have.
        hires: The pass at a higher resolution that follows; None for none.
        evaluations_before: Of the pass that this one follows.
        first_pass_steps: The `prompt_steps` of that pass; None for none.
        control_units: Of its ControlNets and T2I-Adapters.
        refiner: The rest of the run, by a refiner; None for none.
        first_evaluation: Where it begins in the run that prompts change in.
        continues_after: Noises sampled by the pass whose noisy latents it takes over; None for a
            run under noise of its own.
        lora: Factors that its rows have of their own; None where LoRA files are in the weights.
    """

    requests: Sequence[Request]
    options: GenerationOptions
    scheduler_config: Mapping[str, Any]
    table: SamplerTable
    guidance: Guidance
    size: tuple[int, int]
    max_batch: int
    prompt_steps: int
    embeddings: EmbeddingSet
    hires: "HiresPass | None" = None
    evaluations_before: int = 0
    first_pass_steps: int | None = None
    control_units: tuple[ControlUnit, ...] = ()
    refiner: "RefinerPass | None" = None
    first_evaluation: int = 0
    continues_after: int | None = None
    lora: LoraFactors | None = None

    @property
    def later_pass(self) -> "HiresPass | RefinerPass | None":
        """What follows, if anything does."""
        return self.hires or self.refiner

    def with_lora(self, lora: LoraFactors) -> "GenerationJob":
        """The same with factors, in a second pass too; a refiner has none."""
        hires = self.hires and replace(self.hires, job=replace(self.hires.job, lora=lora))
        return replace(self, lora=lora, hires=hires)

    def get_timeline(self, request: Request) -> PromptTimeline:
        """The texts that an image's evaluations read."""
        timeline = build_prompt_timeline(
            request.prompt,
            request.negative_prompt,
            self.first_evaluation + self.table.evaluations,
            self.prompt_steps,
            first_pass_steps=self.first_pass_steps,
            weighting=self.options.weighting,
        )
        return timeline.skip(self.first_evaluation) if self.first_evaluation else timeline

    def get_guidance(self, timeline: PromptTimeline) -> Guidance:
        """The guidance of an image, by all prompts that are joined in its own."""
        same = timeline.weights == self.guidance.weights
        return self.guidance if same else replace(self.guidance, weights=timeline.weights)

    def get_table(self, timeline: PromptTimeline) -> SamplerTable:
        """The sampler's numbers for an image: where its prompt changes, features are not reused."""
        if self.options.feature_reuse == 1 or timeline.is_plain:
            return self.table
        rows = self.get_guidance(timeline).num_rows.tolist()
        every, order = self.options.feature_reuse, self.options.feature_reuse_order
        return with_feature_reuse(self.table, every, rows, timeline.changes, order)

    def get_num_rows(self, timeline: PromptTimeline) -> int:
        """Rows of the model's batch for an image, at most."""
        return int(self.get_guidance(timeline).num_rows.max())

    def get_run_key(self, timeline: PromptTimeline) -> Hashable:
        """Equal for images that share a run's numbers."""
        return timeline.weights, self.options.feature_reuse > 1 and timeline.changes

    def get_pass_keys(self, request: Request) -> tuple[Hashable, ...]:
        """Equal for images that share the numbers of all passes."""
        keys = [self.get_run_key(self.get_timeline(request))]
        if later := self.later_pass:
            keys.append(later.job.get_run_key(later.get_timeline(request)))
        return tuple(keys)

    @property
    def total_evaluations(self) -> int:
        """Of all passes."""
        after = self.later_pass.job.table.evaluations if self.later_pass else 0
        return self.evaluations_before + self.table.evaluations + after

    def place_step(self, step: Step) -> Step:
        """A step of this pass, counted over all passes."""
        if step.total == self.total_evaluations:  # the only one
            return step
        index = self.evaluations_before + step.index
        return replace(step, index=index, total=self.total_evaluations)


def uses_control_graph(job: GenerationJob) -> bool:
    """Whether the UNet reads residuals of nets, or an image prompt."""
    options = job.options
    has_image_prompt = options.ip_adapter_image is not None and np.any(options.ip_adapter_scale)
    return bool(job.control_units or has_image_prompt)


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

    def get_timeline(self, request: Request) -> PromptTimeline:
        """The texts that an image's evaluations read in this pass."""
        return self.job.get_timeline(self.get_request(request))


@dataclass(frozen=True, slots=True)
class RefinerPass:
    """The validated part of a run that a refiner does.

    Attributes:
        job: Its call, without requests.
        name: Of its bundle.
        switch_at: The fraction of the run before it.
    """

    job: GenerationJob
    name: str
    switch_at: float

    def get_timeline(self, request: Request) -> PromptTimeline:
        """The texts that an image's evaluations read in this part."""
        return self.job.get_timeline(request)


def reuse_outputs(job: GenerationJob) -> GenerationJob:
    """Reduce a job, and its hires pass if any, to the evaluations that `output_reuse` computes.

    Raises:
        UsageError: The job needs the evaluations that would be left out.
    """
    timelines = [job.get_timeline(request) for request in job.requests]
    if job.hires:
        timelines += [job.hires.get_timeline(request) for request in job.requests]
    if any(any(timeline.changes) for timeline in timelines):
        raise UsageError(
            "output_reuse with a prompt that changes during the run is unsupported",
            hint="leave one of them out",
        )
    reduced = _leave_out_evaluations(job)
    if job.hires:
        second = _leave_out_evaluations(job.hires.job)
        second = replace(second, evaluations_before=reduced.table.evaluations)
        reduced = replace(reduced, hires=replace(job.hires, job=second))
    return reduced


def _leave_out_evaluations(job: GenerationJob) -> GenerationJob:
    every, scales = job.options.output_reuse, job.guidance.scales
    check_output_reuse(job.table, scales, job.control_units, sampler_name(job.scheduler_config))
    table, computed = with_output_reuse(job.table, every)
    if len(computed) == 1 < job.table.evaluations:
        raise UsageError(
            f"output_reuse {every} leaves one evaluation of {job.table.evaluations}",
            hint="lower it, or raise num_inference_steps",
        )
    return replace(job, table=table, guidance=replace(job.guidance, scales=scales[computed]))


def parse_output_size(manifest: Manifest, options: GenerationOptions) -> tuple[int, int]:
    """(width, height) of a call's images; raises UsageError for a size that the model cannot
    generate.
    """
    size = parse_size(options.size) if options.size else manifest.sizes[0]
    if options.image_latents is not None:
        size = _size_of_latents(manifest, options, options.image_latents)
    check_output_size(manifest, size)
    return size


def check_output_size(manifest: Manifest, size: tuple[int, int], name: str = "size") -> None:
    """Raise UsageError for (width, height) of images that the model cannot generate.

    Args:
        manifest: The bundle's manifest.
        size: (width, height) in pixels.
        name: The option's, for the error.
    """
    sizes, multiple = manifest.sizes, manifest.multiple
    if size not in sizes and any(side % multiple for side in size):
        available = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise UsageError(
            f"{name} {size[0]}x{size[1]} is not in this bundle, which has {available}",
            hint=f"pass one of these, or multiples of {multiple}",
        )


def _size_of_latents(
    manifest: Manifest, options: GenerationOptions, latents: np.ndarray
) -> tuple[int, int]:
    """(width, height) of the image of latents; raises UsageError where they are another model's or
    another size's.
    """
    _, channels, height, width = latents.shape
    size = width * manifest.downscale, height * manifest.downscale
    if channels != manifest.latent_channels:
        raise UsageError(
            f"image_latents have {channels} channels; those of this model have "
            f"{manifest.latent_channels}",
            hint="pass latents of a model of the same family",
        )
    if options.size and parse_size(options.size) != size:
        raise UsageError(
            f"image_latents are of {size[0]}x{size[1]}, and size is {options.size}",
            hint="leave size out",
        )
    return size


def describe_size(size: tuple[int, int], validated: Sequence[tuple[int, int]]) -> str:
    """A warning of a size, (width, height), that is not one of those validated."""
    name, *names = (f"{width}x{height}" for width, height in (size, *validated))
    tiles = all(size[0] > width or size[1] > height for width, height in validated)
    return (
        f"{name} is not one of the sizes that this bundle was validated at ({', '.join(names)})"
        f"{', and is decoded in tiles' if tiles else ''}; to validate it, build with --size {name}"
    )


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
    denoising_start: float | None = None,
) -> SamplerTable:
    """The sampler's table of a call.

    skipped_steps: of a pass that starts from latents; None where the options say all
    denoising_start: of a pass that takes over another's noisy latents; the same
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
        image=options.starts_from_image and not replaced,
        denoising_start=denoising_start or options.denoising_start,
        denoising_end=options.denoising_end,
    )


def count_prompt_steps(
    scheduler_config: Mapping[str, Any], options: GenerationOptions, skipped_steps: int | None
) -> int:
    """Steps that changing prompts count: twice as many for samplers with two evaluations a step,
    and in a run from an image those that it skips too, as in A1111.

    skipped_steps: of a second pass, which does not count them
    """
    steps = options.num_inference_steps - (skipped_steps or 0)
    if options.timesteps is not None:
        steps = len(options.timesteps)
    elif options.sigmas is not None:
        steps = len(options.sigmas) - 1
    return steps * SAMPLERS[sampler_name(scheduler_config)].evaluations_per_step


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


def check_prompts(job: GenerationJob, *, has_negative_row: bool) -> None:
    """Read every prompt of all passes.

    Raises:
        UsageError: For a prompt that is not understood, and for several joined by `AND` where
            guidance is not by a second row.
    """
    timelines = [job.get_timeline(request) for request in job.requests]
    if later := job.later_pass:
        timelines += [later.get_timeline(request) for request in job.requests]
    if not has_negative_row and any(len(timeline.prompts) > 1 for timeline in timelines):
        raise UsageError(
            "AND is unsupported by this model: it has no negative prompt to compose with",
            hint="write it in lower case to have it read as text",
        )
