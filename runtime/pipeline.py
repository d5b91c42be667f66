"""The pipeline: from a prompt to images, over a bundle's engines.

Knows the stages of a call (`stages.py`); not how each is done.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Unpack, overload

import numpy as np
from PIL.Image import Image

from sdrt.errors import UsageError

from .arguments import GenerationKwargs, parse_options
from .denoising import Step
from .job import GenerationJob
from .leases import LeasedIterator
from .lora.sets import refuse_tags
from .lora.tags import LoraWeight
from .options import GenerationOptions
from .output import (
    OUTPUT_TYPES,
    ArrayOutput,
    Output,
    OutputType,
    StepCallback,
    annotate_image,
    as_tuple,
    show_progress,
)
from .parsing import (
    choice_parser,
    parse_callable,
    parse_flag,
    parse_lora_weights,
    parse_scheduler_config,
    parse_text,
)
from .requests import Request
from .safety_checker import detect_marks
from .samplers.table import sampler_table
from .stages import PipelineStages, Prompt, read_latents
from .text.token_count import TokenCount, count_tokens
from .textual_inversion.store import Source as EmbeddingSource
from .unsupported import refuse_attribute, refuse_change, refuse_copy

T = TypeVar("T")
ImageStream = Iterator[tuple[Request, Image]]
PRECISIONS = {"float32": "fp32", "float16": "fp16"}  # by dtype


class Pipeline(PipelineStages):
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

    __slots__ = ()

    if not TYPE_CHECKING:  # type checkers report an attribute that is not there by themselves

        def __getattr__(self, name: str) -> None:
            raise refuse_attribute(name, dir(type(self)))

        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise refuse_attribute("from_pretrained")

    def __setattr__(self, name: str, value: object) -> None:
        raise refuse_change(f"{name} = ...")

    def __delattr__(self, name: str) -> None:
        raise refuse_change(f"del {name}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise refuse_copy()

    def __repr__(self) -> str:
        """One line: bundle, backend, precision and first size."""
        size = "x".join(map(str, self.manifest.sizes[0]))
        backend = self.backend.replace(" on ", "/")
        parts = self.manifest.name, backend, self.compute_precision, size
        return f"Pipeline({', '.join(filter(None, parts))})"

    @property
    def compute_precision(self) -> str:
        """What the backend computes in: that it chose, or the bundle's."""
        return self.precision or PRECISIONS.get(self.manifest.components["unet"].dtype, "")

    @overload
    def __call__(
        self,
        prompt: Prompt = None,
        *,
        output_type: Literal["pil"] | None = "pil",
        return_dict: Literal[True] = True,
        on_step: StepCallback = None,
        progress: bool = False,
        **options: Unpack[GenerationKwargs],
    ) -> Output: ...

    @overload
    def __call__(
        self,
        prompt: Prompt = None,
        *,
        output_type: Literal["np", "latent"],
        return_dict: Literal[True] = True,
        on_step: StepCallback = None,
        progress: bool = False,
        **options: Unpack[GenerationKwargs],
    ) -> ArrayOutput: ...

    @overload
    def __call__(
        self,
        prompt: Prompt = None,
        *,
        output_type: OutputType | None = "pil",
        return_dict: Literal[False],
        on_step: StepCallback = None,
        progress: bool = False,
        **options: Unpack[GenerationKwargs],
    ) -> tuple[Any, ...]: ...

    def __call__(
        self,
        prompt: Prompt = None,
        *,
        output_type: OutputType | None = "pil",
        return_dict: bool = True,
        on_step: StepCallback = None,
        progress: bool = False,
        **options: Unpack[GenerationKwargs],
    ) -> Output | ArrayOutput | tuple[Any, ...]:
        """Generate the images of every prompt.

        Args:
            prompt: One or several.
            output_type: "pil" for images, "np" for an array [B, H, W, 3] float32 in [0, 1],
                "latent" for latents [B, C, H/8, W/8] float32.
            return_dict: Whether to return an `Output`; else a tuple, as diffusers does.
            on_step: Called with a `Step` after every evaluation of every batch.
            progress: Whether to show a progress bar.
            **options: The fields of `GenerationOptions`; also diffusers' `height` and `width`,
                `generator`, and `callback_on_step_end_tensor_inputs`.

        Returns:
            An `Output`, or an `ArrayOutput` for "np" and "latent".

        Raises:
            UsageError: For an option that is unknown, out of range or does not fit the model.
            SdrtError: For an image that holds NaN or infinity.
            BackendError: After `close`.
        """
        parsed = parse_options(options)
        kind = choice_parser(*OUTPUT_TYPES)("output_type", output_type or "pil")
        return_dict = parse_flag("return_dict", return_dict)
        progress = parse_flag("progress", progress)
        if on_step is not None:
            parse_callable("on_step", on_step)
        with self.leases.call(), show_progress(on_step, progress) as watch:
            job = self.create_job(prompt, parsed)
            refuse_tags(job.requests, parsed)
            texts = [self.parameters_text(request, job) for request in job.requests]
            output = self._generate_output(job, watch, kind, texts)
        if return_dict:
            return output
        return as_tuple(output, self.tokenizer_2 is not None, "safety_checker" in self.engines)

    def _generate_output(
        self, job: GenerationJob, on_step: StepCallback, output_type: str, texts: list[str]
    ) -> Output | ArrayOutput:
        """All images of a job, in its order."""
        seeds = [request.seed for request in job.requests]

        def in_order(generated: Iterator[tuple[Request, T]]) -> list[T]:
            values = {request.index: value for request, value in generated}
            return [values[request.index] for request in job.requests]

        if output_type == "pil":
            images = in_order(self._stream(job, on_step))
            marks = detect_marks(images)
            return Output([*map(annotate_image, images, texts)], seeds, texts, *marks)
        if output_type == "np":
            pairs = in_order(self._generate(job, on_step, self._decode_array, decode=False))
            arrays = np.stack([array for array, _ in pairs])
            return ArrayOutput(arrays, seeds, texts, *detect_marks([image for _, image in pairs]))
        if job.options.returns_image:
            raise UsageError("output_type latent at strength 0: there are no latents")
        latents = in_order(self._generate(job, on_step, read_latents, decode=False))
        return ArrayOutput(np.stack(latents), seeds, texts)

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
        return self._generate(job, on_step, self._decode_result)

    def steps(self, prompt: Prompt = None, **options: Unpack[GenerationKwargs]) -> Iterator[Step]:
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
        return self.denoise_passes(batches[0], job)

    def count_tokens(self, prompt: str, **options: Unpack[GenerationKwargs]) -> TokenCount:
        """Count a prompt's tokens, of 75 that the model reads at a time.

        Args:
            prompt: One; of one that changes during the run, the longest text counts.
            **options: As for a call.

        Raises:
            UsageError: For a model without a text encoder.
        """
        tokenizers = [encoder.tokenizer for encoder in self.text_encoders]
        if not tokenizers:
            raise UsageError("this model reads no prompt: it is unconditional")
        return count_tokens(tokenizers, parse_text("prompt", prompt), parse_options(options))

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
            config = self.find_scheduler(scheduler)
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

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: EmbeddingSource | Sequence[EmbeddingSource],
        token: str | Sequence[str] | None = None,
    ) -> None:
        """Load embeddings, so that prompts may use their words, as diffusers' method of this name.

        They act on all pipelines over these engines, from the next call on: one that runs keeps the
        words that it began with. In models with two text encoders a file holds vectors for both.

        Args:
            pretrained_model_name_or_path: A `.safetensors` file, the name of one in the folder
                `embeddings` of sdrt's home, a folder that diffusers wrote, or tensors by name; or
                several.
            token: The word of each; several for one source are a word for each of its vectors.
                None is the word that the file has, or its name.

        Raises:
            CheckpointError: For a file that is not an embedding or does not fit this model, and for
                a word that is in the vocabulary or loaded already. Nothing is changed then.
            UsageError: For arguments that do not fit together.
        """
        self.embeddings.load(pretrained_model_name_or_path, token)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget the words that `load_textual_inversion` loaded; None for all.

        Raises:
            UsageError: For a word that is not loaded.
        """
        self.embeddings.unload(tokens)

    def close(self) -> None:
        """Release the engines' memory, also of pipelines over the same engines.

        Waits for the calls that have begun; later ones raise BackendError. May be called again.

        Raises:
            UsageError: Inside a call of this thread, as `set_lora` does.
        """
        with self.leases.change("close", closing=True):
            others = self.refiner.engines if self.refiner else {}
            for engine in (*self.engines.values(), *others.values()):
                engine.close()
            self.upscalers.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.leases.drop_paused()  # loops that an error or a break left
        self.close()
