"""From a prompt to images, over a bundle's engines: validate, condition, denoise, decode.

Knows numpy, the engine protocol and the bundle's manifest; not which backend runs.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from PIL.Image import Image, fromarray

from sdrt.bundle.manifest import Manifest
from sdrt.engine import Engine, SamplingResult
from sdrt.engine.memory_estimator import MemoryEstimator
from sdrt.engine.protocol import UnfusedAttention
from sdrt.errors import SdrtError, UsageError

from .arguments import parse_options
from .batch import Batch, build_latent_edit, build_states
from .deepcache import check_feature_reuse, with_feature_reuse
from .denoising import DenoisingState, LatentEdit, Step, denoise
from .embedded_guidance import (
    add_guidance_embedding,
    check_guidance,
    guidance_embedding_width,
    without_guidance,
)
from .images import image_to_array, images_from_decoded
from .initial_latents import build_initial_state, check_task, encode_image_inputs
from .job import GenerationJob, apply_eta, build_guidance, build_table, parse_output_size
from .leases import LeasedIterator, Leases
from .lora.adapters import Adapters
from .lora.sets import refuse_negative_tags, refuse_tags
from .lora.tags import LoraWeight
from .options import GenerationOptions
from .output import Output
from .parameters import describe_grid, describe_image
from .parsing import parse_callable, parse_lora_weights, parse_scheduler_config
from .requests import Request, parse_requests, parse_unconditional_requests
from .safety_checker import apply_safety_checker, detect_marks
from .samplers.registry import config_from_name
from .samplers.table import sampler_table
from .sampling_program import can_encode_text, is_linear, run_sampling_program
from .text.conditioning import (
    Conditioning,
    EncodedChunkCache,
    PromptEncoder,
    build_conditioning,
    group_by_length,
    tokenize_requests,
)
from .text.tokenizer import Tokenizer
from .vae import Tiling, decode_latents, encode_pixels

log = logging.getLogger(__name__)
Prompt = str | Sequence[str] | None
StepCallback = Callable[[Step], None] | None
ImageStream = Iterator[tuple[Request, Image]]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Generates images with a bundle's engines. `sdrt.load` creates one; call it with a prompt.

    A pipeline is immutable: `with_scheduler` returns another one over the same engines.

    Any number of threads may use a pipeline, and pipelines over the same engines, at the same
    time, also through `asyncio.to_thread`. Each gets the images that it would get alone.

    - Calls at the same time share the processor's cores: together they take as long as one after
      the other. On ONNX Runtime and torch each needs memory for its own activations. On OpenVINO,
      on GPUs and with `low_memory` they take turns at a component.
    - `InflightBatcher` puts calls into one batch, for the most images per second.
    - `set_lora` and `close` wait for the calls that have begun; later calls wait for them.
    - An iterator of `steps` or `stream` belongs to one thread at a time. It counts as a call until
      it is exhausted, closed or deleted.
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

    def __call__(
        self, prompt: Prompt = None, *, on_step: StepCallback = None, **options: Any
    ) -> Output:
        """Generate the images of every prompt.

        Args:
            prompt: One or several.
            on_step: Called with a `Step` after every evaluation of every batch.
            **options: The fields of `GenerationOptions`.

        Raises:
            UsageError: For an option that is unknown, out of range or does not fit the model.
            SdrtError: For an image that holds NaN or infinity.
            BackendError: After `close`.
        """
        parsed = parse_options(options)
        if on_step is not None:
            parse_callable("on_step", on_step)
        with self.leases.call():
            job = self.create_job(prompt, parsed)
            refuse_tags(job.requests, parsed)
            images = {request.index: image for request, image in self._stream(job, on_step)}
            texts = [self.parameters_text(request, job) for request in job.requests]
        in_order = [images[request.index] for request in job.requests]
        seeds = [request.seed for request in job.requests]
        return Output(in_order, seeds, texts, *detect_marks(in_order))

    def stream(
        self, prompt: Prompt, options: GenerationOptions, on_step: StepCallback = None
    ) -> ImageStream:
        """As a call, but yields each request with its image once it is finished."""

        def run() -> ImageStream:
            job = self.create_job(prompt, options)
            refuse_tags(job.requests, options)
            return self._stream(job, on_step)

        return LeasedIterator(self.leases, run)

    def stream_job(self, job: GenerationJob, on_step: StepCallback = None) -> ImageStream:
        """As `stream`, of a job from `create_job`.

        Raises:
            SdrtError: After all other images, for one that holds NaN or infinity.
        """
        return LeasedIterator(self.leases, partial(self._stream, job, on_step))

    def _stream(self, job: GenerationJob, on_step: StepCallback) -> ImageStream:
        if job.options.returns_image:
            yield from ((request, self.input_image(job)) for request in job.requests)
            return
        failed = None
        for batch in self._prepare_batches(job, encode_text=on_step is not None):
            result = self._denoise(batch, job, on_step)
            for i, request in enumerate(batch.requests):
                try:
                    image = self._decode_result(result, i)
                except SdrtError as error:
                    failed = SdrtError(f"seed {request.seed}: {error.message}", hint=error.hint)
                    continue
                yield request, image
        if failed:
            raise failed

    def steps(self, prompt: Prompt = None, **options: Any) -> Iterator[Step]:
        """The denoising loop of one batch, one `Step` per evaluation; arguments as for a call."""
        return LeasedIterator(self.leases, partial(self._steps, prompt, parse_options(options)))

    def _steps(self, prompt: Prompt, options: GenerationOptions) -> Iterator[Step]:
        job = self.create_job(prompt, options)
        refuse_tags(job.requests, options)
        if options.returns_image:
            return iter(())
        batches = list(self._prepare_batches(job))
        if len(batches) > 1:
            raise UsageError(
                f"{len(batches)} batches in one loop; this bundle generates {job.max_batch} images "
                "together, of prompts of similar length",
                hint="loop over fewer images",
            )
        edit = build_latent_edit(self, batches[0], job)
        return denoise(self.engines, build_states(batches[0], job), edit)

    # Validate

    def create_job(self, prompt: Prompt, options: GenerationOptions) -> GenerationJob:
        """Validate a call and see that memory has room for it.

        Raises:
            UsageError: For what does not fit the bundle, or this machine's memory.
        """
        job = self.validate(prompt, options)
        job = replace(job, max_batch=self._max_batch(job))
        if job.size not in self.manifest.sizes:
            log.warning(
                "%dx%d is not one of the sizes that this bundle was validated at (%s); what is "
                "larger is decoded in tiles",
                *job.size,
                ", ".join(f"{width}x{height}" for width, height in self.manifest.sizes),
            )
        return job

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
        width = self.guidance_embedding_width
        if width:
            check_guidance(options)
        config = apply_eta(self.scheduler_config, options)
        table = build_table(config, options)
        has_negative_row = self.accepts_prompt and not width
        guidance = build_guidance(options, table.evaluations, has_negative_row=has_negative_row)
        if options.feature_reuse > 1:
            check_feature_reuse(manifest, self.engines, self.backend)
            table = with_feature_reuse(table, options.feature_reuse, 1 + (guidance.scales != 1.0))
        max_batch = manifest.batch[2]
        return GenerationJob(requests, options, config, table, guidance, size, max_batch)

    def _max_batch(self, job: GenerationJob) -> int:
        """How many images are generated together: what the bundle allows, as far as memory has
        room; raises UsageError where it has none for one.
        """
        if (
            self.memory_estimator is None or job.size == self.manifest.sizes[0]
        ):  # checked when it was loaded
            return job.max_batch
        rows = 2 if job.options.guided and self.accepts_prompt else 1
        unet = self.engines["unet"]
        keeps_scores = isinstance(unet, UnfusedAttention) and unet.keeps_scores
        return self.memory_estimator.max_images(job.size, rows, job.max_batch, keeps_scores)

    @property
    def accepts_prompt(self) -> bool:
        """Whether there is a text encoder; an unconditional model has none."""
        return "text_encoder" in self.manifest.components

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
        tokenizers = {"text_encoder": self.tokenizer, "text_encoder_2": self.tokenizer_2}
        max_rows = self.manifest.batch[2]
        return [
            PromptEncoder(name, self.engines[name], tokenizer, max_rows, self.chunk_cache)
            for name, tokenizer in tokenizers.items()
            if tokenizer is not None
        ]

    def encode_conditioning(
        self, requests: Sequence[Request], options: GenerationOptions, size: tuple[int, int]
    ) -> list[Conditioning]:
        """Of every image, what the UNet reads besides latents and timestep.

        Raises:
            UsageError: For embeddings or options that the model does not accept.
        """
        if not self.accepts_prompt:
            return [{} for _ in requests]
        width = self.guidance_embedding_width
        conditioning = build_conditioning(
            self.text_encoders,
            requests,
            without_guidance(options) if width else options,
            input_names=[spec.name for spec in self.manifest.components["unet"].inputs],
            size=size,
            zero_empty_prompt=self.manifest.zero_empty_prompt,
        )
        return add_guidance_embedding(conditioning, options, width) if width else conditioning

    def _tokenize(self, job: GenerationJob) -> list[Conditioning] | None:
        """Token ids of every image, where the engine encodes them as part of the run; else None."""
        encodes_text = can_encode_text(self.manifest, self.engines, job.options)
        if not (encodes_text and is_linear(job.table, job.guidance)):
            return None
        return tokenize_requests(self.text_encoders[0], job.requests, job.options)

    def _prepare_batches(
        self, job: GenerationJob, *, encode_text: bool = True, together: bool = True
    ) -> Iterator[Batch]:
        """Images whose conditioning has one length together, or each alone.

        encode_text: now; else the engine may do it as part of the run
        """
        conditioning = None if encode_text else self._tokenize(job)
        if not conditioning:
            conditioning = self.encode_conditioning(job.requests, job.options, job.size)
        by_request = dict(zip(job.requests, conditioning, strict=True))
        shape = self._latent_shape(job)
        encode = partial(encode_pixels, self.engines["vae_encoder"], self._tiling)
        inputs = encode_image_inputs(encode, job, shape, self.in_channels)
        groups = group_by_length(by_request, job.max_batch) if together else zip(job.requests)
        for requests in groups:
            states = [build_initial_state(request, job, shape, inputs) for request in requests]
            yield Batch(requests, [by_request[request] for request in requests], states, inputs)

    def prepare_states(
        self, job: GenerationJob
    ) -> Iterator[tuple[Request, DenoisingState, LatentEdit | None]]:
        """Every image alone, at its beginning, with what edits its latents after each evaluation.

        The caller holds a lease (`leases`) from here until each image is decoded.
        """
        for batch in self._prepare_batches(job, together=False):
            (state,) = build_states(batch, job)
            yield batch.requests[0], state, build_latent_edit(self, batch, job)

    def _latent_shape(self, job: GenerationJob) -> tuple[int, int, int]:
        """[C, H/8, W/8] of an image."""
        width, height = job.size
        scale = self.manifest.downscale
        return self.manifest.latent_channels, height // scale, width // scale

    # Denoise

    def _denoise(self, batch: Batch, job: GenerationJob, on_step: StepCallback) -> SamplingResult:
        """A batch's result; as one program where nothing observes or edits the run."""
        states, edit = build_states(batch, job), build_latent_edit(self, batch, job)
        if on_step is None and edit is None:
            decode = job.size in self.manifest.sizes  # others are decoded in tiles
            result = run_sampling_program(
                self.engines, states, decode=decode, clip_skip=job.options.clip_skip
            )
            if result:
                return result
        for step in denoise(self.engines, states, edit):
            if on_step:
                on_step(step)
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
        assert job.options.image is not None
        pixels = image_to_array(job.options.image, job.size)
        return self._check_safety(images_from_decoded(pixels))[0]

    def _decode_result(self, result: SamplingResult, i: int) -> Image:
        """One image of a batch; raises as `decode`."""
        if result.pixels is None or not result.finite[i]:
            return self.decode(result.latents[i : i + 1])[0]
        return self._check_safety([fromarray(result.pixels[i])])[0]

    def _decode_each(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """[1, 3, H, W] of one image after the other: the decoder's activations dwarf all else, and
        a batch gains nothing.
        """
        for i in range(len(latents)):
            yield decode_latents(self.engines, self._tiling, latents[i : i + 1])

    @property
    def _tiling(self) -> Tiling:
        scale = self.manifest.downscale
        return Tiling([(h // scale, w // scale) for w, h in self.manifest.sizes], scale)

    def _check_safety(self, images: list[Image]) -> list[Image]:
        return apply_safety_checker(self.engines.get("safety_checker"), images)

    def parameters_text(self, request: Request, job: GenerationJob) -> str:
        """The settings of an image, for its file."""
        return describe_image(request, job, self.manifest, self.adapters, self.bundle_config)

    def grid_parameters_text(self, job: GenerationJob) -> str:
        """The settings of all images of a job, for the file of their grid."""
        return describe_grid(self.parameters_text(job.requests[0], job), job)

    # Configure and close

    def with_scheduler(self, scheduler: str | Mapping[str, Any]) -> "Pipeline":
        """A pipeline over the same engines with another sampler.

        Args:
            scheduler: A class name of diffusers or a name of other tools, such as "DPM++ 2M
                Karras", which keep this bundle's noise schedule; or a full configuration.

        Raises:
            UsageError: For an unknown name or a configuration that is unsupported.
        """
        if isinstance(scheduler, str):
            xl = self.tokenizer_2 is not None
            config = config_from_name(scheduler, self.scheduler_config, xl=xl)
        else:
            config = parse_scheduler_config("scheduler", scheduler)
        sampler_table(config, 8)
        return replace(self, scheduler_config=config)

    def set_lora(self, loras: Mapping[str | os.PathLike[str], float | LoraWeight]) -> None:
        """Apply these LoRA files and no others; `{}` removes all.

        They act on all pipelines over these engines. Waits for the calls that have begun on any of
        them; calls that begin meanwhile wait for it.

        Args:
            loras: Weights by path, or by the name of a file in the folder `loras` of sdrt's home.
                A weight is a number, or a `LoraWeight` with one for the text encoders and one for
                the UNet.

        Raises:
            CheckpointError: For a file that is not a LoRA or does not fit this model.
            BundleError: For a bundle that does not name its weights.
            UsageError: Inside a call of this thread: in a callback, or in a loop that is not
                finished. Nothing is changed after an error.
        """
        weights = parse_lora_weights(loras)
        with self.leases.change("set_lora"):
            try:
                self.adapters.set(weights)
            finally:
                self.chunk_cache.clear()

    def close(self) -> None:
        """Release the engines' memory, also of pipelines over the same engines.

        Waits for the calls that have begun; later ones raise BackendError. May be called again.

        Raises:
            UsageError: Inside a call of this thread, as `set_lora` does.
        """
        with self.leases.change("close", closing=True):
            for engine in self.engines.values():
                engine.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.leases.drop_paused()  # loops that an error or a break left
        self.close()
