"""The stages of a call: validate, condition, denoise, decode.

Knows numpy, the engine protocol and the bundle's manifest; not which backend runs.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from PIL.Image import Image, fromarray

from sdrt.bundle.manifest import LORA_PARTS, TEXT_ENCODERS, Manifest
from sdrt.engine import Engine, SamplingResult
from sdrt.engine.memory_estimator import MemoryEstimator
from sdrt.engine.page_cache import trim_heap
from sdrt.engine.protocol import UnfusedAttention, release_memory
from sdrt.errors import SdrtError

from .batch import Batch, build_latent_edit, build_states, group_alike
from .conditioning_schedule import ConditioningSchedule, build_constant_schedule
from .controlnet.control import prepare_control
from .controlnet.net import ControlNet
from .controlnet.unit import build_control_units
from .deepcache import check_feature_reuse, with_feature_reuse
from .denoising import DenoisingState, LatentEdit, Step, denoise
from .embedded_guidance import (
    add_guidance_embedding,
    check_guidance,
    guidance_embedding_width,
    without_guidance,
)
from .hires import build_hires_pass, prepare_hires_batches
from .images import image_to_array, images_from_decoded
from .initial_latents import build_initial_state, check_task, encode_image_inputs
from .ip_adapter import IpAdapter, add_image_prompt, check_ip_adapter
from .job import (
    GenerationJob,
    apply_eta,
    build_guidance,
    build_table,
    check_prompts,
    count_prompt_steps,
    describe_size,
    parse_output_size,
    reuse_outputs,
)
from .leases import Leases
from .lora.adapters import Adapters
from .lora.rows import LoraFactors, LoraRows
from .lora.sets import refuse_negative_tags
from .options import GenerationOptions
from .output import StepCallback
from .parameters import describe_grid, describe_image
from .prompt_timeline import PromptTimeline
from .refiner import (
    build_refiner_pass,
    check_refiner_task,
    prepare_refiner_batches,
    split_options,
)
from .requests import Request, parse_requests, parse_unconditional_requests
from .safety_checker import apply_safety_checker, is_flagged
from .samplers.registry import config_from_name
from .sampling_program import can_encode_text, is_linear, run_sampling_program
from .text.conditioning import (
    EncodedChunkCache,
    PromptEncoder,
    build_conditioning,
    tokenize_prompts,
)
from .text.tokenizer import Tokenizer
from .textual_inversion.engine import word_engine_name
from .textual_inversion.store import EmbeddingStore
from .textual_inversion.words import EmbeddingSet
from .upscaling import Upscalers
from .vae import Tiling, decode_latents, encode_pixels

log = logging.getLogger(__name__)
Prompt = str | Sequence[str] | None
LARGE = 512 * 512  # pixels of an image, from which on room is made for its decoding
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PipelineStages:
    """A bundle's engines, and the stages of a call with them.

    Attributes:
        manifest: Of the bundle.
        tokenizer: Of the text encoder, if there is one.
        engines: By component.
        scheduler_config: Of the sampler.
        backend: Its name and device.
        adapters: The LoRA files in use.
        tokenizer_2: Of the second text encoder, in models such as SDXL.
        chunk_cache: Prompts encoded before.
        bundle_config: The bundle's own scheduler configuration.
        memory_estimator: Whether a size has room; None is not checked.
        leases: Of the calls that run.
        embeddings: The words of textual inversion.
        precision: That the backend computes in, where it is not the bundle's.
        upscalers: Of second passes.
        control_nets: ControlNets and T2I-Adapters by name.
        ip_adapter: Of image prompts.
        lora_rows: Of images that share calls of the model with different LoRA files.
        refiner: Of the last part of runs; its engines are its text encoder's and its UNet's.
    """

    manifest: Manifest
    tokenizer: Tokenizer | None
    engines: Mapping[str, Engine]
    scheduler_config: Mapping[str, Any]
    backend: str
    adapters: Adapters = field(repr=False, compare=False)
    tokenizer_2: Tokenizer | None = None
    chunk_cache: EncodedChunkCache = field(default_factory=dict, repr=False, compare=False)
    bundle_config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    memory_estimator: MemoryEstimator | None = field(default=None, repr=False, compare=False)
    leases: Leases = field(default_factory=Leases, repr=False, compare=False)
    embeddings: EmbeddingStore = field(
        default_factory=lambda: EmbeddingStore({}, {}), repr=False, compare=False
    )
    precision: str = ""
    upscalers: Upscalers = field(default_factory=Upscalers, repr=False, compare=False)
    control_nets: Mapping[str, ControlNet] = field(default_factory=dict, repr=False)
    ip_adapter: IpAdapter | None = None
    lora_rows: LoraRows | None = field(default=None, repr=False, compare=False)
    refiner: "PipelineStages | None" = field(default=None, repr=False, compare=False)

    # Validate

    def create_job(self, prompt: Prompt, options: GenerationOptions) -> GenerationJob:
        """Validate a call and see that memory has room for it.

        Raises:
            UsageError: For what does not fit the bundle, or this machine's memory.
        """
        job = self.validate(prompt, options)
        passes = [(self, job, job.get_timeline)]
        if later := job.later_pass:
            passes.append((self._stages_of_later_pass(job), later.job, later.get_timeline))
        for stages, run, get_timeline in passes:
            rows = max(run.get_num_rows(get_timeline(request)) for request in job.requests)
            job = replace(job, max_batch=min(job.max_batch, stages._max_batch(run, rows)))
            if run.size not in stages.manifest.sizes:
                log.warning("%s", describe_size(run.size, stages.manifest.sizes))
        return job

    def _stages_of_later_pass(self, job: GenerationJob) -> "PipelineStages":
        """Whose engines run what follows a job."""
        if job.refiner is None:
            return self
        assert self.refiner is not None
        return self.refiner

    def validate(self, prompt: Prompt, options: GenerationOptions) -> GenerationJob:
        """Validate a call by the manifest alone: no engine need be loaded.

        Raises:
            UsageError: For what does not fit the bundle.
        """
        manifest = self.manifest
        parse = parse_requests if self.accepts_prompt else parse_unconditional_requests
        requests, size = parse(prompt, options), parse_output_size(manifest, options)
        refuse_negative_tags(requests, options)
        channels = manifest.latent_channels
        check_task(options, self.in_channels - channels, channels)
        check_refiner_task(manifest, options, self.refiner is not None)
        if self.guidance_embedding_width:
            check_guidance(options)
        if self.refiner is not None and options.refiner_switch_at is not None:
            job = self.build_job(requests, split_options(options)[0], size)
            job = replace(job, refiner=build_refiner_pass(self.refiner, job, options))
        else:
            job = self.build_job(requests, options, size)
        if options.has_hires_pass:
            job = replace(job, hires=build_hires_pass(self, job))
        if options.output_reuse > 1:
            job = reuse_outputs(job)
        check_prompts(job, has_negative_row=self._has_negative_row)
        return job

    def find_scheduler(self, name: str) -> Mapping[str, Any]:
        """The configuration of a sampler's name; raises UsageError for an unknown one."""
        return config_from_name(name, self.scheduler_config, xl=self.tokenizer_2 is not None)

    def build_job(
        self,
        requests: Sequence[Request],
        options: GenerationOptions,
        size: tuple[int, int],
        scheduler_config: Mapping[str, Any] | None = None,
        skipped_steps: int | None = None,
        denoising_start: float | None = None,
    ) -> GenerationJob:
        """One pass over validated requests.

        Args:
            requests: The images.
            options: Of the pass.
            size: (width, height).
            scheduler_config: None is the pipeline's.
            skipped_steps: As for `build_table`.
            denoising_start: The same.
        """
        manifest = self.manifest
        config = apply_eta(scheduler_config or self.scheduler_config, options)
        table = build_table(config, options, skipped_steps, denoising_start)
        guidance = build_guidance(
            options, table.evaluations, has_negative_row=self._has_negative_row
        )
        check_ip_adapter(options, self.ip_adapter)
        control_units = build_control_units(options, self.control_nets)
        if options.feature_reuse > 1:
            check_feature_reuse(manifest, self.engines, self.backend, bool(control_units))
            table = with_feature_reuse(
                table,
                options.feature_reuse,
                guidance.num_rows.tolist(),
                order=options.feature_reuse_order,
            )
        return GenerationJob(
            requests,
            options,
            config,
            table,
            guidance,
            size,
            max_batch=manifest.batch[2],
            prompt_steps=count_prompt_steps(config, options, skipped_steps),
            control_units=control_units,
            embeddings=self.embeddings.current,
            continues_after=None if options.denoising_start is None else 0,
        )

    def _max_batch(self, job: GenerationJob, rows: int) -> int:
        """How many images of so many rows are generated together: what the bundle allows, as far as
        memory has room; raises UsageError where it has none for one.
        """
        limit = max(1, 2 * job.max_batch // max(rows, 2))  # the bundle counts two rows an image
        is_checked = job.size == self.manifest.sizes[0] and rows <= 2  # when it was loaded
        if self.memory_estimator is None or (is_checked and not job.control_units):
            return limit
        unet = self.engines["unet"]
        keeps_scores = isinstance(unet, UnfusedAttention) and unet.keeps_scores
        return self.memory_estimator.max_images(job.size, rows, limit, keeps_scores)

    @property
    def accepts_prompt(self) -> bool:
        """Whether there is a text encoder; an unconditional model has none."""
        return any(name in self.manifest.components for name in TEXT_ENCODERS)

    @property
    def _has_negative_row(self) -> bool:
        """Whether guidance is by a second row of the model's batch."""
        return self.accepts_prompt and not self.guidance_embedding_width

    @property
    def guidance_embedding_width(self) -> int:
        """Of the guidance scale's embedding, in models that read one; else 0."""
        return guidance_embedding_width(self.manifest)

    @property
    def in_channels(self) -> int:
        """Of the UNet: the latents and, for some models, extra channels."""
        inputs = {spec.name: spec for spec in self.manifest.components["unet"].inputs}
        return int(inputs["sample"].shape[1])

    # Condition

    @property
    def text_encoders(self) -> list[PromptEncoder]:
        """One, two in models such as SDXL, none in unconditional ones."""
        return self._text_encoders(self.embeddings.current)

    def _text_encoders(
        self, embeddings: EmbeddingSet, lora: LoraFactors | None = None
    ) -> list[PromptEncoder]:
        """The text encoders for a call with these words and LoRA factors."""
        words = self.embeddings.for_call(embeddings).by_encoder
        max_rows, cache = self.manifest.batch[2], self.chunk_cache
        return [
            PromptEncoder(
                name,
                self.engines[name],
                own.tokenizer,
                max_rows,
                cache,
                self.engines.get(word_engine_name(name)),
                own,
                self.engines.get(LORA_PARTS[name]),
                lora,
            )
            for name, own in words.items()
        ]

    def encode_conditioning(
        self,
        requests: Sequence[Request],
        timelines: Sequence[PromptTimeline],
        options: GenerationOptions,
        size: tuple[int, int],
        embeddings: EmbeddingSet | None = None,
        lora: LoraFactors | None = None,
    ) -> list[ConditioningSchedule]:
        """Of every image, what the UNet reads besides latents and timestep.

        Args:
            requests: The images.
            timelines: Of each, the texts that it reads.
            options: Of their call.
            size: (width, height) of the images.
            embeddings: The words of textual inversion; by default those of a call that begins now.
            lora: Of the text encoders, where they are not in the weights.

        Raises:
            UsageError: For embeddings or options that the model does not accept.
        """
        if not self.accepts_prompt:
            return [build_constant_schedule({}) for _ in requests]
        width = self.guidance_embedding_width
        conditioning = build_conditioning(
            self._text_encoders(embeddings or self.embeddings.current, lora),
            requests,
            timelines,
            without_guidance(options) if width else options,
            input_names=[spec.name for spec in self.manifest.components["unet"].inputs],
            size=size,
            zero_empty_prompt=self.manifest.zero_empty_prompt,
            num_time_ids=self.manifest.num_time_ids,
        )
        if width:
            conditioning = add_guidance_embedding(conditioning, options, width)
        return add_image_prompt(conditioning, self.engines, options, self.ip_adapter)

    def _tokenize(
        self, job: GenerationJob, timelines: Sequence[PromptTimeline]
    ) -> list[ConditioningSchedule] | None:
        """Token ids of every image, where the engine encodes them as part of the run; else None."""
        encodes_text = can_encode_text(self.manifest, self.engines, job.options)
        if job.control_units or job.options.ip_adapter_image is not None:
            return None
        if not (encodes_text and is_linear(job.table, job.guidance)):
            return None
        if not all(timeline.is_plain for timeline in timelines):
            return None
        encoder = self._text_encoders(job.embeddings)[0]
        return tokenize_prompts(encoder, timelines, job.options)

    def _prepare_batches(
        self, job: GenerationJob, *, encode_text: bool = True, together: bool = True
    ) -> Iterator[Batch]:
        """Images whose conditioning has one length together, or each alone.

        encode_text: now; else the engine may do it as part of the run
        """
        timelines = [job.get_timeline(request) for request in job.requests]
        conditioning = None if encode_text else self._tokenize(job, timelines)
        if not conditioning:
            conditioning = self.encode_conditioning(
                job.requests, timelines, job.options, job.size, job.embeddings, job.lora
            )
        by_request = dict(zip(job.requests, conditioning, strict=True))
        shape = self.latent_shape(job)
        inputs = encode_image_inputs(self.encode, job, shape, self.in_channels)
        units, evaluations = job.control_units, job.table.evaluations
        control = prepare_control(units, self.engines, job.size, evaluations)
        groups = group_alike(by_request, job.max_batch, job.get_pass_keys)
        for requests in groups if together else zip(job.requests):
            states = [build_initial_state(request, job, shape, inputs) for request in requests]
            conditioning = [by_request[request] for request in requests]
            timeline = job.get_timeline(requests[0])
            yield Batch(requests, conditioning, states, inputs, timeline, control)

    def prepare_states(
        self, job: GenerationJob
    ) -> Iterator[tuple[Request, DenoisingState, LatentEdit | None]]:
        """Every image alone, at its beginning, with what edits its latents after each evaluation.

        The caller holds a lease (`leases`) from here until each image is decoded.
        """
        for batch in self._prepare_batches(job, together=False):
            (state,) = build_states(batch, job)
            yield batch.requests[0], state, build_latent_edit(self, batch, job)

    def encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode one image [1, 3, H, W] in [-1, 1] to mean and deviation, [C, H/8, W/8] each."""
        return encode_pixels(self.engines["vae_encoder"], self.tiling, pixels)

    def latent_shape(self, job: GenerationJob) -> tuple[int, int, int]:
        """[C, H/8, W/8] of an image."""
        width, height = job.size
        scale = self.manifest.downscale
        return self.manifest.latent_channels, height // scale, width // scale

    # Denoise

    def _generate(
        self,
        job: GenerationJob,
        on_step: StepCallback,
        read: Callable[[SamplingResult, int], T],
        *,
        decode: bool = True,
    ) -> Iterator[tuple[Request, T]]:
        """Each request with what `read` makes of its result and its place in the batch.

        decode: whether the engine may decode as part of the run
        """
        if job.options.returns_image:
            result = SamplingResult(np.zeros(0), np.asarray(self._resize_input(job))[None], [True])
            yield from ((request, read(result, 0)) for request in job.requests)
            return
        failed = None
        for batch in self._prepare_batches(job, encode_text=on_step is not None):
            for requests, result in self._run_passes(batch, job, on_step, decode):
                for i, request in enumerate(requests):
                    try:
                        value = read(result, i)
                    except SdrtError as error:
                        failed = SdrtError(f"seed {request.seed}: {error.message}", hint=error.hint)
                        continue
                    yield request, value
        if failed:
            raise failed

    def _run_passes(
        self, batch: Batch, job: GenerationJob, on_step: StepCallback, decode: bool
    ) -> Iterator[tuple[Sequence[Request], SamplingResult]]:
        """The result of a batch, or of the second pass's batches."""
        later = job.later_pass
        result = self._denoise(batch, job, on_step, decode and later is None)
        if later is None:
            yield batch.requests, result
            return
        stages, decode = self._stages_of_later_pass(job), decode and job.refiner is None
        for second in self._prepare_later_batches(job, batch.requests, result.latents):
            yield second.requests, stages._denoise(second, later.job, on_step, decode)

    def _prepare_later_batches(
        self, job: GenerationJob, requests: Sequence[Request], latents: np.ndarray
    ) -> Iterator[Batch]:
        """The batches of what follows, of the latents [B, C, H/8, W/8] that end a job."""
        if job.refiner is None:
            return prepare_hires_batches(self, job, requests, latents)
        return prepare_refiner_batches(self._stages_of_later_pass(job), job, requests, latents)

    def prepare_later_state(
        self, job: GenerationJob, request: Request, latents: np.ndarray
    ) -> tuple[DenoisingState, LatentEdit | None]:
        """One image at the beginning of what follows, and what edits its latents there.

        latents: [C, H/8, W/8] that end the job
        """
        assert job.later_pass is not None
        later = job.later_pass.job
        (batch,) = self._prepare_later_batches(job, [request], latents[None])
        (state,) = build_states(batch, later)
        return state, build_latent_edit(self._stages_of_later_pass(job), batch, later)

    def denoise_passes(self, batch: Batch, job: GenerationJob) -> Iterator[Step]:
        """All passes of a batch as one loop, whose second pass is of one batch again."""
        edit = build_latent_edit(self, batch, job)
        for step in denoise(self.engines, build_states(batch, job), edit):
            yield job.place_step(step)
        if later := job.later_pass:
            (second,) = self._prepare_later_batches(job, batch.requests, step.latents)
            yield from self._stages_of_later_pass(job).denoise_passes(second, later.job)

    def _denoise(
        self, batch: Batch, job: GenerationJob, on_step: StepCallback, decode: bool
    ) -> SamplingResult:
        """A batch's result; as one program where nothing observes or edits the run."""
        states, edit = build_states(batch, job), build_latent_edit(self, batch, job)
        if on_step is None and edit is None:
            decode = decode and job.size in self.manifest.sizes  # others are decoded in tiles
            result = run_sampling_program(
                self.engines, states, decode=decode, clip_skip=job.options.clip_skip
            )
            if result:
                return result
        for step in denoise(self.engines, states, edit):
            if on_step:
                on_step(job.place_step(step))
        return SamplingResult(step.latents)

    # Decode

    def decode(self, latents: np.ndarray) -> list[Image]:
        """Decode latents to images; one that the safety checker flags is black.

        Args:
            latents: [B, C, H/8, W/8] float32.

        Raises:
            SdrtError: For NaN or infinity.
        """
        with self.leases.call():
            images = [images_from_decoded(pixels)[0] for pixels in self._decode_each(latents)]
            return self._check_safety(images)

    def decode_to_array(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents [B, C, H/8, W/8] to the decoder's output, [B, 3, H, W] about [-1, 1].

        Raises:
            SdrtError: For NaN or infinity.
        """
        with self.leases.call():
            return np.concatenate(list(self._decode_each(latents)))

    def input_image(self, job: GenerationJob) -> Image:
        """The image to start from in the job's size, which is the result at strength 0."""
        return self._check_safety([self._resize_input(job)])[0]

    def _resize_input(self, job: GenerationJob) -> Image:
        assert job.options.image is not None
        return images_from_decoded(image_to_array(job.options.image, job.size))[0]

    def _decode_result(self, result: SamplingResult, i: int) -> Image:
        """One image of a batch; raises as `decode`."""
        if result.pixels is None or not result.finite[i]:
            return self.decode(result.latents[i : i + 1])[0]
        return self._check_safety([fromarray(result.pixels[i])])[0]

    def _decode_array(self, result: SamplingResult, i: int) -> tuple[np.ndarray, Image]:
        """One image of a batch, [H, W, 3] float32 in [0, 1], and as the safety checker sees it."""
        if result.pixels is None:
            pixels = self.decode_to_array(result.latents[i : i + 1])[0].transpose(1, 2, 0)
            array = np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
        else:
            array = result.pixels[i].astype(np.float32) / np.float32(255.0)
        rounded = fromarray(np.rint(array * np.float32(255.0)).astype(np.uint8))
        image = self._check_safety([rounded])[0]
        return np.zeros_like(array) if is_flagged(image) else array, image

    def _decode_each(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """[1, 3, H, W] of one image after the other: the decoder's activations dwarf all else, and
        a batch gains nothing. Before large ones, what engines hold only to be faster is released.
        """
        if math.prod(latents.shape[2:]) * self.manifest.downscale**2 >= LARGE:
            others = self.refiner.engines.values() if self.refiner else ()
            for engine in (*self.engines.values(), *others):
                release_memory(engine)
            trim_heap()
        for i in range(len(latents)):
            yield decode_latents(self.engines, self.tiling, latents[i : i + 1])

    @property
    def tiling(self) -> Tiling:
        """How sizes larger than the bundle's go through the autoencoder."""
        scale = self.manifest.downscale
        return Tiling([(h // scale, w // scale) for w, h in self.manifest.sizes], scale)

    def _check_safety(self, images: list[Image]) -> list[Image]:
        return apply_safety_checker(self.engines.get("safety_checker"), images)

    def parameters_text(self, request: Request, job: GenerationJob) -> str:
        """The settings of an image, for its file."""
        words = self.embeddings.for_call(job.embeddings)
        return describe_image(request, job, self.manifest, self.adapters, self.bundle_config, words)

    def grid_parameters_text(self, job: GenerationJob) -> str:
        """The settings of all images of a job, for the file of their grid."""
        return describe_grid(self.parameters_text(job.requests[0], job), job)


def read_latents(result: SamplingResult, i: int) -> np.ndarray:
    """[C, H/8, W/8] of one image; raises SdrtError for NaN and infinity."""
    latents: np.ndarray = result.latents[i]
    if not np.isfinite(latents).all():
        raise SdrtError("the model's latents hold NaN or infinity")
    return latents
