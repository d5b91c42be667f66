"""The second pass of a call at a higher resolution, as A1111's "hires fix" runs it.

- The image's size times `hires_scale`, rounded down; or `hires_size`, where two sides of another
  ratio crop the enlarged image.
- All of `hires_steps` are run: they are the last ones of a grid of `hires_steps / hires_strength`.
- Latents start under the first noise of the image's seed, at the new size; an image is encoded to
  the mean of its latents.

Knows validated jobs and a pipeline's stages; not the loop.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from sdrt.bundle.manifest import Manifest
from sdrt.engine import Engine
from sdrt.errors import SdrtError, UsageError

from .batch import Batch, group_alike
from .conditioning_schedule import ConditioningSchedule
from .hires_options import HIRES_PARSERS, MAX_HIRES_STEPS
from .images import MAX_SIDE, image_to_array, images_from_decoded
from .initial_latents import LatentDistribution, build_initial_state, encode_image_inputs
from .job import GenerationJob, HiresPass
from .lora.rows import LoraFactors
from .lora.tags import check_untagged
from .options import DEFAULTS, GenerationOptions
from .prompt_timeline import PromptTimeline
from .requests import Request
from .textual_inversion.words import EmbeddingSet
from .upscaling import LatentUpscaler, Upscalers

Size = tuple[int, int]


class Stages(Protocol):
    """What this module needs of a pipeline: see `PipelineStages`."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def engines(self) -> Mapping[str, Engine]: ...
    @property
    def upscalers(self) -> Upscalers: ...
    @property
    def in_channels(self) -> int: ...
    def find_scheduler(self, name: str) -> Mapping[str, Any]: ...
    def build_job(
        self,
        requests: Sequence[Request],
        options: GenerationOptions,
        size: Size,
        scheduler_config: Mapping[str, Any] | None = None,
        skipped_steps: int | None = None,
    ) -> GenerationJob: ...
    def encode_conditioning(
        self,
        requests: Sequence[Request],
        timelines: Sequence[PromptTimeline],
        options: GenerationOptions,
        size: Size,
        embeddings: EmbeddingSet | None = None,
        lora: LoraFactors | None = None,
    ) -> list[ConditioningSchedule]: ...
    def latent_shape(self, job: GenerationJob) -> tuple[int, int, int]: ...
    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...
    def decode_to_array(self, latents: np.ndarray) -> np.ndarray: ...


def parse_hires_sizes(options: GenerationOptions, size: Size, manifest: Manifest) -> list[Size]:
    """(width, height) of a second pass before and after its crop.

    Args:
        options: Of the call.
        size: Of its first pass.
        manifest: Of the bundle.

    Raises:
        UsageError: For a size that the model cannot generate.
    """
    scale, multiple = manifest.downscale, manifest.multiple
    enlarged, crop = _enlarged_size(options, size, scale)
    upscaled = enlarged[0] // scale * scale, enlarged[1] // scale * scale
    cropped = upscaled[0] - crop[0] * scale, upscaled[1] - crop[1] * scale
    if any(side % multiple or not 0 < side <= MAX_SIDE for side in cropped):
        raise UsageError(
            f"the hires pass has the size {cropped[0]}x{cropped[1]}; expected multiples of "
            f"{multiple} up to {MAX_SIDE}",
            hint="change hires_scale, or pass hires_size",
        )
    return [upscaled, cropped]


def _enlarged_size(options: GenerationOptions, size: Size, scale: int) -> tuple[Size, Size]:
    """(width, height) in pixels, and how many latents are cropped from each."""
    width, height = size
    if options.hires_size is None:
        factor = options.hires_scale or 1.0
        return (int(width * factor), int(height * factor)), (0, 0)
    x, y = options.hires_size
    by_width = not y or (x > 0 and width / height < x / y)
    enlarged = (x, x * height // width) if by_width else (y * width // height, y)
    if not (x and y):
        return enlarged, (0, 0)
    return enlarged, ((enlarged[0] - x) // scale, (enlarged[1] - y) // scale)


def build_hires_pass(stages: Stages, job: GenerationJob) -> HiresPass:
    """Validate the second pass of a job by the manifest alone.

    Raises:
        UsageError: For what does not fit the bundle.
    """
    options = job.options
    upscaled, size = parse_hires_sizes(options, job.size, stages.manifest)
    upscaler = stages.upscalers.find(options.hires_upscaler)
    if not isinstance(upscaler, LatentUpscaler) and "vae_encoder" not in stages.manifest.components:
        raise UsageError(
            f"hires_upscaler {options.hires_upscaler} encodes an image, and this bundle has no "
            "encoder",
            hint='pass hires_upscaler="Latent"',
        )
    steps = options.hires_steps or options.num_inference_steps
    grid = int(steps / min(options.hires_strength, 0.999))
    if grid > MAX_HIRES_STEPS:
        raise UsageError(
            f"{steps} hires steps at hires_strength {options.hires_strength:g} are the last of "
            f"{grid}; expected at most {MAX_HIRES_STEPS}",
            hint="raise hires_strength, or lower hires_steps",
        )
    second = stages.build_job(
        (),
        _second_options(options, grid, size),
        size,
        stages.find_scheduler(options.hires_scheduler) if options.hires_scheduler else None,
        skipped_steps=grid - steps,
    )
    return HiresPass(
        replace(
            second,
            evaluations_before=job.table.evaluations,
            first_pass_steps=job.prompt_steps,
        ),
        *(steps, upscaler, upscaled),
        _check_prompts("hires_prompt", options.hires_prompt, job),
        _check_prompts("hires_negative_prompt", options.hires_negative_prompt, job),
    )


def _second_options(options: GenerationOptions, steps: int, size: Size) -> GenerationOptions:
    defaults: dict[str, Any] = {name: DEFAULTS[name] for name in HIRES_PARSERS}
    guidance_scale = options.hires_guidance_scale
    return replace(
        options,
        **defaults,
        num_inference_steps=steps,
        guidance_scale=options.guidance_scale if guidance_scale is None else guidance_scale,
        size=f"{size[0]}x{size[1]}",
        latents=None,
    )


def _check_prompts(
    name: str, prompts: str | Sequence[str] | None, job: GenerationJob
) -> Sequence[str] | None:
    """One for each prompt of the job; raises UsageError for another number, and for LoRA tags."""
    count = max(request.prompt_index for request in job.requests) + 1
    if prompts is None:
        return None
    prompts = [prompts] * count if isinstance(prompts, str) else prompts
    if len(prompts) != count:
        raise UsageError(
            f"{len(prompts)} of {name} for {count} prompts",
            hint="pass one for each prompt, or one for all",
        )
    for prompt in prompts if job.options.weighting else ():
        check_untagged(prompt, name, "put it into the prompt: both passes have the same weights")
    return prompts


def prepare_hires_batches(
    stages: Stages, job: GenerationJob, requests: Sequence[Request], latents: np.ndarray
) -> Iterator[Batch]:
    """The second pass's batches, of the latents [B, C, H/8, W/8] that end the first."""
    hires = job.hires
    assert hires is not None
    changed = [hires.get_request(request) for request in requests]
    second = replace(hires.job, requests=changed)
    timelines = dict(zip(requests, map(second.get_timeline, changed), strict=True))
    conditioning = stages.encode_conditioning(
        changed, [*timelines.values()], second.options, second.size, job.embeddings, job.lora
    )
    by_request = dict(zip(requests, conditioning, strict=True))
    shape = stages.latent_shape(second)
    inputs = encode_image_inputs(stages.encode, second, shape, stages.in_channels)
    starts = {
        request: LatentDistribution(upscaled, np.zeros(shape, np.float32))
        for request, upscaled in zip(
            requests, (_upscale_latents(stages, hires, result) for result in latents), strict=True
        )
    }
    keys = {request: second.get_run_key(timeline) for request, timeline in timelines.items()}
    for group in group_alike(by_request, second.max_batch, keys.__getitem__):
        states = [
            build_initial_state(request, second, shape, replace(inputs, image=starts[request]))
            for request in group
        ]
        rows = [by_request[request] for request in group]
        yield Batch(group, rows, states, inputs, timelines[group[0]])


def _upscale_latents(stages: Stages, hires: HiresPass, latents: np.ndarray) -> np.ndarray:
    """[C, H/8, W/8] -> the second pass's, cropped; NaN where there is no image to enlarge, which is
    reported at the end with other images' results.
    """
    channels, height, width = stages.latent_shape(hires.job)
    scale = stages.manifest.downscale
    sides = hires.upscaled_size[1] // scale, hires.upscaled_size[0] // scale
    if isinstance(hires.upscaler, LatentUpscaler):
        upscaled = hires.upscaler.upscale(latents, sides)
    else:
        try:
            image = images_from_decoded(stages.decode_to_array(latents[None]))[0]
        except SdrtError:
            return np.full((channels, height, width), np.nan, np.float32)
        enlarged = hires.upscaler.upscale(image, hires.upscaled_size)
        pixels = image_to_array(enlarged, hires.upscaled_size)
        upscaled, _ = stages.encode(pixels)
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    return upscaled[:, top : top + height, left : left + width]
