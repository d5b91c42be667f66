"""Prompt to picture over a bundle's engines.

Knows numpy, the engine protocol and the bundle's manifest; not which backend runs.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from PIL.Image import Image, fromarray

from sdrt.bundle import parse_size
from sdrt.bundle.manifest import Manifest
from sdrt.engine import Engine, SamplingResult
from sdrt.engine.memory_estimator import MemoryEstimator
from sdrt.errors import SdrtError, UsageError

from .deepcache import check_feature_reuse, with_feature_reuse
from .denoising import DenoisingState, Edit, Guidance, Step, denoise, get_history_layout
from .embedded_guidance import (
    add_guidance_embedding,
    check_guidance,
    guidance_embedding_width,
    without_guidance,
)
from .images import image_array, images_from_decoded, parameters_text, quoted
from .initial_latents import (
    ImageInputs,
    InitialState,
    build_initial_state,
    check_task,
    encode_image_inputs,
)
from .leases import Leases, Loop
from .lora.adapters import Adapters
from .lora.names import outside_names
from .lora.sets import refuse_negative_tags, refuse_tags
from .lora.tags import LoraWeight
from .options import (
    GenerationOptions,
    Request,
    options_from,
    requests_from,
    requests_without_prompt,
    shortest,
)
from .parsing import configuration, function, lora_weights, numbers, refusal
from .safety_checker import apply_safety_checker, detect_marks
from .samplers.registry import config_beyond_name, config_from_name, title_of
from .samplers.table import SamplerTable, sampler_table
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


@dataclass(frozen=True, slots=True)
class Output:
    """The pictures of a call, the seed of each, the text that goes into each file, whether the
    safety checker made it black, and whether the model made it one colour all over.
    """

    images: list[Image]
    seeds: list[int]
    parameters: list[str]
    flagged: list[bool] = field(default_factory=list)
    flat: list[bool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures that are made together.

    told: what the model is fed of each besides latents and time; see `denoising.Run`
    """

    requests: Sequence[Request]
    conditioning: Sequence[Conditioning]
    starts: Sequence[InitialState]
    image_inputs: ImageInputs


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Engines, tokenizers and sampler configuration. Made by `load_pipeline`; call it for pictures.

    Immutable: `with_scheduler` gives another pipeline over the same engines.

    Any number of threads may use one pipeline, and pipelines over the same engines, at the same
    time, also through `asyncio.to_thread`; each gets the images that it would get alone. Calls at
    the same time share the processor's cores, so they are no faster together than one after the
    other, and each needs memory for an image's activations of its own on ONNX Runtime and torch; on
    OpenVINO, on GPUs and with `low_memory` they take turns at a component. For the most images a
    second see `InflightBatcher`, which puts calls together. `set_lora` and `close` wait for the
    calls that have begun, and calls that begin meanwhile wait for them. The iterators of `steps`
    and `pictures` belong to one thread at a time, and count as calls until they are finished,
    closed or dropped.
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
    room: MemoryEstimator | None = field(default=None, repr=False, compare=False)
    leases: Leases = field(default_factory=Leases, repr=False, compare=False)

    def __call__(
        self,
        prompt: Prompt = None,
        *,
        on_step: StepCallback = None,
        **options: Any,
    ) -> Output:
        """Make pictures of every prompt; the named arguments are those of `Options`.

        on_step: called after every evaluation of every batch.
        Raises UsageError for a value out of range, SdrtError when a picture holds no numbers,
        BackendError when the pipeline is closed.
        """
        chosen = options_from(options)
        if on_step is not None:
            function("on_step", on_step)
        with self.leases.call():
            made = sorted(self._pictures(prompt, chosen, on_step), key=lambda each: each[0].index)
            texts = [self.parameters_text(request, chosen) for request, _ in made]
        images, seeds = [image for _, image in made], [request.seed for request, _ in made]
        return Output(images, seeds, texts, *detect_marks(images))

    def stream(
        self, prompt: Prompt, options: GenerationOptions, on_step: StepCallback = None
    ) -> Iterator[tuple[Request, Image]]:
        """The pictures of a call, as they are finished; SdrtError, after all others, for one that
        holds no numbers.
        """
        return Loop(self.leases, partial(self._pictures, prompt, options, on_step))

    def pictures_of(
        self, requests: Sequence[Request], options: GenerationOptions, on_step: StepCallback = None
    ) -> Iterator[tuple[Request, Image]]:
        """As `pictures`, of requests from `planned`."""
        return Loop(self.leases, partial(self._pictures_of, requests, options, on_step))

    def _pictures(
        self, prompt: Prompt, options: GenerationOptions, on_step: StepCallback
    ) -> Iterator[tuple[Request, Image]]:
        requests, *_ = self.planned(prompt, options)
        refuse_tags(requests, options)
        yield from self._pictures_of(requests, options, on_step)

    def _pictures_of(
        self, requests: Sequence[Request], options: GenerationOptions, on_step: StepCallback
    ) -> Iterator[tuple[Request, Image]]:
        table, guidance = self._run(options)
        if options.returns_image:
            yield from ((request, self.input_image(options)) for request in requests)
            return
        failed = None
        told = None if on_step else self._texts(requests, options, table, guidance)
        for batch in self._batches(requests, options, table, told=told):
            made = self._finished(batch, options, table, guidance, on_step)
            for i, request in enumerate(batch.requests):
                try:
                    image = self._decode_result(made, i)
                except SdrtError as error:
                    failed = SdrtError(f"seed {request.seed}: {error}")
                    continue
                yield request, image
        if failed:
            raise failed

    def steps(self, prompt: Prompt = None, **options: Any) -> Iterator[Step]:
        """The denoising loop, one `Step` per evaluation; arguments as for a call, one batch."""
        return Loop(self.leases, partial(self._steps, prompt, options_from(options)))

    def _steps(self, prompt: Prompt, chosen: GenerationOptions) -> Iterator[Step]:
        requests, table, guidance, _ = self.planned(prompt, chosen)
        refuse_tags(requests, chosen)
        if chosen.returns_image:
            return iter(())
        batches = list(self._batches(requests, chosen, table))
        if len(batches) > 1:
            raise UsageError(
                f"{len(batches)} batches in one loop; this bundle takes "
                f"{self.manifest.batch[2]} pictures of prompts of like length"
            )
        runs = build_states(batches[0], table, guidance)
        return denoise(self.engines, runs, self._edit(batches[0], chosen, table))

    def planned(
        self, prompt: Prompt, options: GenerationOptions
    ) -> tuple[list[Request], SamplerTable, Guidance, tuple[int, int]]:
        """What is known of a call before anything is computed: its pictures, their sampler's
        table, their guidance and their (width, height). Raises UsageError for what does not fit.
        """
        requests, size = self.validate(prompt, options)
        self._max_batch_size(size, options)
        if size not in self.manifest.sizes:
            log.warning(
                "%dx%d is none of the sizes that this bundle was proven at (%s); what is larger "
                "than those is decoded in tiles",
                *size,
                ", ".join(f"{width}x{height}" for width, height in self.manifest.sizes),
            )
        return requests, *self._run(options), size

    def input_image(self, options: GenerationOptions) -> Image:
        """The image to start from in the size asked for, which is the result at strength 0."""
        assert options.image is not None
        pixels = image_array(options.image, self._size(options))
        return self._check_safety(images_from_decoded(pixels))[0]

    def validate(
        self, prompt: Prompt, options: GenerationOptions
    ) -> tuple[list[Request], tuple[int, int]]:
        """The images of a call and their (width, height), by the manifest alone: no engine need be
        loaded. Raises UsageError for what does not fit the bundle.
        """
        reading = requests_from if self.accepts_prompt else requests_without_prompt
        requests, size = reading(prompt, options), self._size(options)
        refuse_negative_tags(requests, options)
        fed = {spec.name: spec for spec in self.manifest.components["unet"].inputs}["sample"]
        channels = self.manifest.latent_channels
        check_task(options, int(fed.shape[1]) - channels, channels)
        if self.guidance_embedding_width:
            check_guidance(options)
        self._run(options)
        return requests, size

    def prepare_states(
        self, requests: Sequence[Request], options: GenerationOptions
    ) -> Iterator[tuple[Request, DenoisingState, Edit | None]]:
        """Every picture as a run of its own at its beginning, in order, with what edits its
        latents after each evaluation. The caller holds a lease (`leases`) from here until each
        picture is decoded.
        """
        table, guidance = self._run(options)
        for batch in self._batches(requests, options, table, together=False):
            run = build_states(batch, table, guidance)[0]
            yield batch.requests[0], run, self._edit(batch, options, table)

    def decode(self, latents: np.ndarray) -> list[Image]:
        """Pictures of latents [B, C, H/8, W/8], black where the safety checker flags one; raises
        SdrtError if they hold NaN or infinity.
        """
        with self.leases.call():
            return self._check_safety(
                [images_from_decoded(each)[0] for each in self._decode_each(latents)]
            )

    def decode_to_array(self, latents: np.ndarray) -> np.ndarray:
        """The decoder's numbers, [B, 3, H, W] about [-1, 1]; raises SdrtError for NaN."""
        with self.leases.call():
            return np.concatenate(list(self._decode_each(latents)))

    def _decode_each(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """The decoder's numbers of one picture after the other.

        One at a time: the decoder's activations dwarf all else, and a batch gains nothing.
        """
        for i in range(len(latents)):
            yield decode_latents(self.engines, self._tiling, latents[i : i + 1])

    @property
    def _tiling(self) -> Tiling:
        scale = self.manifest.downscale
        return Tiling([(h // scale, w // scale) for w, h in self.manifest.sizes], scale)

    def with_scheduler(self, scheduler: str | Mapping[str, Any]) -> "Pipeline":
        """The same engines with another sampler: a class name or a name that other tools use for
        one, which keep this configuration's noise schedule, or a whole configuration.
        """
        if isinstance(scheduler, str):
            xl = self.tokenizer_2 is not None
            config = config_from_name(scheduler, self.scheduler_config, xl=xl)
        else:
            config = configuration("scheduler", scheduler)
        sampler_table(config, 8)
        return replace(self, scheduler_config=config)

    def set_lora(self, loras: Mapping[str | os.PathLike[str], float | LoraWeight]) -> None:
        """Carry these LoRA files, each with its weight, and no others: `{}` takes all off.

        loras: by path, or by the name of a file in the folder `loras` of sdrt's home; a weight is a
            number, or a `LoraWeight` with one for the text encoders and one for the UNet
        They act on all pipelines over these engines. Waits for the calls that have begun on any of
        them; calls that begin meanwhile wait for it.
        Raises CheckpointError for a file that is none or does not fit this model, BundleError for a
        bundle that does not name its weights, UsageError inside a call of this thread's (a
        callback, or a loop that is not finished); nothing is changed then.
        """
        chosen = lora_weights(loras)
        with self.leases.change("set_lora"):
            try:
                self.adapters.set(chosen)
            finally:
                self.chunk_cache.clear()

    def close(self) -> None:
        """Give the engines' memory back; pipelines over the same engines end too. Waits for the
        calls that have begun; later ones raise BackendError. May be called again.

        Raises UsageError inside a call of this thread's, as `set_lora` does.
        """
        with self.leases.change("close", closing=True):
            for engine in self.engines.values():
                engine.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.leases.drop_paused()  # loops that an error or a break left
        self.close()

    def _run(self, options: GenerationOptions) -> tuple[SamplerTable, Guidance]:
        """The numbers of a run, known before it begins."""
        picture = options.image is not None
        table = sampler_table(
            self.scheduler_config,
            options.num_inference_steps,
            timesteps=options.timesteps,
            sigmas=options.sigmas,
            denoise_from=options.skipped,
            # With a mask and full strength nothing of the picture is left at the start.
            picture=picture and not (options.mask_image is not None and options.share == 1.0),
        )
        share = np.arange(table.evaluations) / table.evaluations
        low, high = options.guidance_interval
        inside = (share >= low) & (share < high) if high < 1.0 else share >= low
        pairs = options.guided and self.accepts_prompt and not self.guidance_embedding_width
        scale = options.guidance_scale if pairs else 1.0
        scales = np.where(inside, scale, 1.0)
        if options.feature_reuse > 1:
            check_feature_reuse(self.manifest, self.engines, self.backend)
            table = with_feature_reuse(table, options.feature_reuse, 1 + (scales != 1.0))
        return table, Guidance(scales, options.guidance_rescale)

    def _max_batch_size(self, size: tuple[int, int], options: GenerationOptions) -> int:
        """How many images are made together: what the bundle takes, as far as memory has room.
        Raises UsageError where there is none for one.
        """
        most = self.manifest.batch[2]
        if self.room is None or size == self.manifest.sizes[0]:  # that was checked at the load
            return most
        rows = 2 if options.guided and self.accepts_prompt else 1
        keeps_scores = bool(getattr(self.engines["unet"], "keeps_scores", False))
        return self.room.max_images(size, rows, most, keeps_scores)

    def _size(self, options: GenerationOptions) -> tuple[int, int]:
        have = self.manifest.sizes
        size = parse_size(options.size) if options.size else have[0]
        multiple = self.manifest.multiple
        if size not in have and any(side % multiple for side in size):
            raise UsageError(
                f"size {size[0]}x{size[1]} is not in this bundle, which has "
                f"{', '.join(f'{w}x{h}' for w, h in have)}; any other is a multiple of {multiple}"
            )
        return size

    def _batches(
        self,
        requests: Sequence[Request],
        options: GenerationOptions,
        table: SamplerTable,
        together: bool = True,
        told: list[Conditioning] | None = None,
    ) -> Iterator[Batch]:
        """Pictures whose contexts are of one length together, as many as the bundle takes, or each
        alone. told: of every picture, where it is known already
        """
        width, height = size = self._size(options)
        most = self._max_batch_size(size, options)
        scale = self.manifest.downscale
        shape = self.manifest.latent_channels, height // scale, width // scale
        each = dict(zip(requests, told or self.encode_conditioning(requests, options), strict=True))
        fed = {spec.name: spec for spec in self.manifest.components["unet"].inputs}["sample"]
        source = encode_image_inputs(
            partial(encode_pixels, self.engines["vae_encoder"], self._tiling),
            options,
            (width, height),
            shape,
            int(fed.shape[1]),
        )
        parts = group_by_length(each, most) if together else [[r] for r in requests]
        for part in parts:
            starts = [build_initial_state(r, options, table, shape, source) for r in part]
            yield Batch(part, [each[r] for r in part], starts, source)

    def _finished(
        self,
        batch: Batch,
        options: GenerationOptions,
        table: SamplerTable,
        guidance: Guidance,
        on_step: StepCallback,
    ) -> SamplingResult:
        """A batch's result; in one go where nobody looks and the engine can."""
        runs, edit = build_states(batch, table, guidance), self._edit(batch, options, table)
        if on_step is None and edit is None:
            whole = self._size(options) in self.manifest.sizes  # others are decoded in tiles
            if made := run_sampling_program(
                self.engines, runs, decoded=whole, skip=options.clip_skip
            ):
                return made
        for step in denoise(self.engines, runs, edit):
            if on_step:
                on_step(step)
        return SamplingResult(step.latents)

    def _decode_result(self, made: SamplingResult, i: int) -> Image:
        """One picture of a batch; raises as `decode`."""
        if made.pixels is None or not made.good[i]:
            return self.decode(made.latents[i : i + 1])[0]
        return self._check_safety([fromarray(made.pixels[i])])[0]

    def _check_safety(self, images: list[Image]) -> list[Image]:
        return apply_safety_checker(self.engines.get("safety_checker"), images)

    def _texts(
        self,
        requests: Sequence[Request],
        options: GenerationOptions,
        table: SamplerTable,
        guidance: Guidance,
    ) -> list[Conditioning] | None:
        """The text of every picture, where the engine reads it in the run; else None."""
        reads = can_encode_text(self.manifest, self.engines, options) and is_linear(table, guidance)
        return tokenize_requests(self.text_encoders[0], requests, options) if reads else None

    @property
    def accepts_prompt(self) -> bool:
        """Whether there is a text encoder; an unconditional model is told nothing."""
        return "text_encoder" in self.manifest.components

    @property
    def text_encoders(self) -> list[PromptEncoder]:
        """One, two in models such as XL, none in unconditional ones."""
        both = {"text_encoder": self.tokenizer, "text_encoder_2": self.tokenizer_2}
        return [
            PromptEncoder(
                name, self.engines[name], tokenizer, self.manifest.batch[2], self.chunk_cache
            )
            for name, tokenizer in both.items()
            if tokenizer is not None
        ]

    def encode_conditioning(
        self, requests: Sequence[Request], options: GenerationOptions
    ) -> list[Conditioning]:
        """What the model is fed of every picture besides latents and time; raises UsageError."""
        if not self.accepts_prompt:
            return [{} for _ in requests]
        fed = [spec.name for spec in self.manifest.components["unet"].inputs]
        size, zeroed = self._size(options), self.manifest.zero_empty_prompt
        width = self.guidance_embedding_width
        rows = without_guidance(options) if width else options
        told = build_conditioning(
            self.text_encoders, requests, rows, fed=fed, size=size, zeroed=zeroed
        )
        return add_guidance_embedding(told, options, width) if width else told

    @property
    def guidance_embedding_width(self) -> int:
        """Of the guidance scale's embedding, in models that are fed one; else 0."""
        return guidance_embedding_width(self.manifest)

    def _edit(self, batch: Batch, options: GenerationOptions, table: SamplerTable) -> Edit | None:
        masked = batch.image_inputs.mask is not None and not batch.image_inputs.is_inpainting_model
        if not masked and options.callback_on_step_end is None:
            return None
        return partial(self._edit_latents, batch, options, table)

    def _edit_latents(
        self,
        batch: Batch,
        options: GenerationOptions,
        table: SamplerTable,
        index: int,
        latents: np.ndarray,
    ) -> np.ndarray:
        """The latents after an evaluation with what the mask keeps put back, and as the caller's
        callback leaves them; it sees them in the solver's own scale.
        """
        if (
            mask := batch.image_inputs.mask
        ) is not None and not batch.image_inputs.is_inpainting_model:
            alpha, sigma = table.shares[index].astype(np.float32)
            known = np.stack([alpha * s.picture + sigma * s.columns[0] for s in batch.starts])
            latents = mask * latents + (1.0 - mask) * known
        if (callback := options.callback_on_step_end) is not None:
            scale = np.float32(table.scales[index])
            timestep = float(table.timesteps[index - 1])
            given = {"latents": latents * scale}
            returned = callback(self, index - 1, timestep, given)
            if not isinstance(returned, Mapping | None):
                raise refusal("callback_on_step_end returned", returned, 'None or {"latents": ..}')
            changed = (returned or given).get("latents")
            if changed is None:
                return latents
            array = numbers("latents of callback_on_step_end", changed)
            if array.shape != latents.shape:
                raise UsageError(
                    f"the callback gave latents {list(array.shape)}, expected {list(latents.shape)}"
                )
            latents = array.astype(np.float32) / scale
        return latents

    def parameters_text(self, request: Request, options: GenerationOptions) -> str:
        """The text that goes into a picture's file."""
        from sdrt.version import __version__

        width, height = self._size(options)
        title = title_of(self.scheduler_config)
        settings: dict[str, object] = {
            "Steps": options.num_inference_steps,
            "Sampler": title,
            **({"CFG scale": shortest(options.guidance_scale)} if self.accepts_prompt else {}),
            "Seed": request.seed,
            "Size": f"{width}x{height}",
            "Model": self.manifest.name,
        }
        if differs := config_beyond_name(title, self.scheduler_config, self.bundle_config):
            settings["Sampler options"] = json.dumps(differs, sort_keys=True)
        settings |= options.unusual
        prompt = request.written or request.prompt
        if self.adapters.text and not request.written:
            if options.weighting:
                prompt += self.adapters.text
            else:  # in the prompt it would be text
                settings["Lora"] = self.adapters.text.strip()
        if outside := outside_names([file for file, _ in self.adapters.chosen]):
            settings["Lora files"] = ", ".join(outside)
        rng = {"cpu": "CPU", "cuda": "NV"}[options.rng]
        settings |= {"RNG": rng, "Version": f"sdrt {__version__}"}
        return parameters_text(prompt, request.negative_prompt, settings)

    def grid_parameters_text(self, requests: Sequence[Request], options: GenerationOptions) -> str:
        """The text that goes into the file of a grid: that of the first image, every seed, and
        every prompt where they differ.
        """
        lists: dict[str, list[Any]] = {
            "Seeds": [request.seed for request in requests],
            "Prompts": [request.written or request.prompt for request in requests],
            "Negative prompts": [request.negative_prompt for request in requests],
        }
        differ = {name: values for name, values in lists.items() if len(set(values)) > 1}
        text = self.parameters_text(requests[0], options)
        return text + "".join(f", {name}: {quoted(values)}" for name, values in differ.items())


def build_states(batch: Batch, table: SamplerTable, guidance: Guidance) -> list[DenoisingState]:
    """The runs of a batch, at their beginning."""
    plan = get_history_layout(table, guidance)
    return [
        DenoisingState(table, guidance, plan, start.columns, told, start.beside)
        for told, start in zip(batch.conditioning, batch.starts, strict=True)
    ]
