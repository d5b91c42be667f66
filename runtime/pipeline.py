"""Prompt to picture over three engines; the loop is a generator that yields latents as they form.

Knows numpy, the engine protocol and the bundle's manifest; not which backend runs.
"""

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL.Image import Image
from sdrt.engine import Candidate, Engine, NumpyHistory

from sdrt.bundle import Bundle, Manifest, parse_size
from sdrt.errors import SdrtError, UsageError

from .noise import randn
from .pictures import images_from_decoded, parameters_text
from .samplers.table import SAMPLERS, SamplerTable, sampler_name, sampler_table
from .tokenizer import Tokenizer

MOST_IMAGES = 1000
MOST_GUIDANCE = 100.0


@dataclass(frozen=True, slots=True)
class Step:
    """The state of a run after one evaluation.

    index, total: evaluations done, and in all
    timestep: what the model was fed
    latents: [B, C, H/8, W/8] float32, the next model input, or the result after the last
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray


@dataclass(frozen=True, slots=True)
class Output:
    """The pictures of a call, the seed of each, and the text that goes into each file."""

    images: list[Image]
    seeds: list[int]
    parameters: list[str]


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to make."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What all pictures of a call share."""

    steps: int
    guidance_scale: float
    width: int
    height: int

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Engines, tokenizer and sampler configuration. Made by `load_pipeline`; call it for pictures.

    Immutable: `with_scheduler` gives another pipeline over the same engines.
    """

    manifest: Manifest
    tokenizer: Tokenizer
    engines: Mapping[str, Engine]
    scheduler_config: Mapping[str, Any]
    backend: str

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 7.5,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        size: str | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Output:
        """Make `num_images` pictures of every prompt.

        seed: of the first picture, the next ones count on from it; or one each; None draws one.
        size: "WIDTHxHEIGHT", one of the bundle's; None is its first.
        on_step: called after every evaluation of every batch.
        Raises UsageError for a value out of range, SdrtError when a picture holds no numbers.
        """
        settings = self._settings(num_inference_steps, guidance_scale, size)
        requests = _requests(prompt, negative_prompt, seed, num_images)
        images = []
        for start in range(0, len(requests), self.manifest.batch[2]):
            batch = requests[start : start + self.manifest.batch[2]]
            for step in self._steps(batch, settings):
                if on_step:
                    on_step(step)
            images += self._decode(step.latents, batch)
        texts = [self._parameters(request, settings) for request in requests]
        return Output(images, [request.seed for request in requests], texts)

    def steps(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 7.5,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        size: str | None = None,
    ) -> Iterator[Step]:
        """The denoising loop, one `Step` per evaluation; arguments as for a call, one batch."""
        settings = self._settings(num_inference_steps, guidance_scale, size)
        requests = _requests(prompt, negative_prompt, seed, num_images)
        if len(requests) > self.manifest.batch[2]:
            raise UsageError(
                f"{len(requests)} pictures in one loop; this bundle takes {self.manifest.batch[2]}"
            )
        return self._steps(requests, settings)

    def decode(self, latents: np.ndarray) -> list[Image]:
        """Pictures of latents [B, C, H/8, W/8]; raises SdrtError if they hold NaN or infinity."""
        return images_from_decoded(self.decoded(latents))

    def with_scheduler(self, scheduler: str | Mapping[str, Any]) -> "Pipeline":
        """The same engines with another sampler: a class name, which keeps this configuration's
        noise schedule, or a whole configuration.
        """
        named = isinstance(scheduler, str)
        config = {**self.scheduler_config, "_class_name": scheduler} if named else dict(scheduler)  # type: ignore[arg-type]
        sampler_table(config, 1)
        return replace(self, scheduler_config=config)

    def close(self) -> None:
        """Give the engines' memory back; pipelines over the same engines end too."""
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settings(self, steps: int, guidance_scale: float, size: str | None) -> Settings:
        if not math.isfinite(guidance_scale) or not 1.0 <= guidance_scale <= MOST_GUIDANCE:
            raise UsageError(
                f"guidance scale {guidance_scale}; expected 1 (no guidance) to {MOST_GUIDANCE:g}"
            )
        sampler_table(self.scheduler_config, steps)
        width, height = parse_size(size) if size else self.manifest.sizes[0]
        if (width, height) not in self.manifest.sizes:
            have = ", ".join(f"{w}x{h}" for w, h in self.manifest.sizes)
            raise UsageError(
                f"size {width}x{height} is not in this bundle, which has {have}; "
                f"type: sdrt build --model {self.manifest.source} --size {width}x{height}"
            )
        return Settings(steps, float(guidance_scale), width, height)

    def _steps(self, requests: Sequence[Request], settings: Settings) -> Iterator[Step]:
        table = sampler_table(self.scheduler_config, settings.steps)
        context = self._context(requests, settings.guided)
        histories = self._histories(requests, settings, table)
        matrix = _matrix(table, settings)
        latents = _combined(histories, matrix[0])
        for k, timestep in enumerate(table.timesteps):
            output = self._evaluate(latents, float(timestep), context, settings.guided)
            _write(histories, k, output, settings.guided)
            latents = _combined(histories, matrix[k + 1])
            yield Step(k + 1, table.evaluations, float(timestep), latents)

    def _context(self, requests: Sequence[Request], guided: bool) -> np.ndarray:
        """[rows, tokens, width]: all negative prompts, if guided, then all prompts."""
        texts = [request.prompt for request in requests]
        if guided:
            texts = [request.negative_prompt for request in requests] + texts
        unique = list(dict.fromkeys(texts))
        most = self.manifest.batch[2]
        parts = [
            self.engines["text_encoder"]({"input_ids": self.tokenizer(unique[i : i + most])})[
                "context"
            ].copy()
            for i in range(0, len(unique), most)
        ]
        encoded = np.concatenate(parts)
        return encoded[[unique.index(text) for text in texts]]

    def _histories(
        self, requests: Sequence[Request], settings: Settings, table: SamplerTable
    ) -> list[NumpyHistory]:
        scale = self.manifest.downscale
        shape = (
            self.manifest.latent_channels,
            settings.height // scale,
            settings.width // scale,
        )
        columns = 1 + table.evaluations * (2 if settings.guided else 1)
        histories = [NumpyHistory(columns, shape) for _ in requests]
        for history, request in zip(histories, requests, strict=True):
            history.write(0, randn(request.seed, (1, *shape))[0])
        return histories

    def _evaluate(
        self, latents: np.ndarray, timestep: float, context: np.ndarray, guided: bool
    ) -> np.ndarray:
        sample = np.concatenate([latents, latents]) if guided else latents
        feeds = {
            "sample": sample,
            "timestep": np.full(len(sample), timestep, np.float32),
            "context": context,
        }
        return self.engines["unet"](feeds)["output"]

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        """The decoder's numbers, [B, 3, H, W] about [-1, 1]; raises SdrtError for NaN."""
        # One at a time: the decoder's activations dwarf all else, and a batch gains nothing.
        parts = [
            self.engines["vae_decoder"]({"latents": latents[i : i + 1]})["image"].copy()
            for i in range(len(latents))
        ]
        decoded = np.concatenate(parts).astype(np.float32)
        for i, picture in enumerate(decoded):
            if not np.isfinite(picture).all():
                raise SdrtError(
                    f"picture {i + 1} of {len(decoded)} holds NaN or infinity, so nothing was "
                    "written; build the bundle with --fp32, or lower the guidance scale"
                )
        return decoded

    def _decode(self, latents: np.ndarray, requests: Sequence[Request]) -> list[Image]:
        assert len(latents) == len(requests)
        return images_from_decoded(self.decoded(latents))

    def _parameters(self, request: Request, settings: Settings) -> str:
        from sdrt import __version__

        return parameters_text(
            request.prompt,
            request.negative_prompt,
            {
                "Steps": settings.steps,
                "Sampler": SAMPLERS[sampler_name(self.scheduler_config)].title,
                "CFG scale": f"{settings.guidance_scale:g}",
                "Seed": request.seed,
                "Size": f"{settings.width}x{settings.height}",
                "Model": self.manifest.name,
                "RNG": "CPU",
                "Version": f"sdrt {__version__}",
            },
        )


def _matrix(table: SamplerTable, settings: Settings) -> np.ndarray:
    if settings.guided:
        return table.guided(settings.guidance_scale)
    return table.matrix.astype(np.float32)


def _combined(histories: Sequence[NumpyHistory], row: np.ndarray) -> np.ndarray:
    return np.stack([history.combine(row) for history in histories])


def _write(histories: Sequence[NumpyHistory], k: int, output: np.ndarray, guided: bool) -> None:
    count = len(histories)
    for i, history in enumerate(histories):
        if guided:
            history.write(1 + 2 * k, output[i])
            history.write(2 + 2 * k, output[count + i])
        else:
            history.write(1 + k, output[i])


def _requests(
    prompt: str | Sequence[str],
    negative_prompt: str,
    seed: int | Sequence[int] | None,
    num_images: int,
) -> list[Request]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    total = len(prompts) * num_images if isinstance(num_images, int) else 0
    if isinstance(num_images, bool) or not 1 <= total <= MOST_IMAGES:
        raise UsageError(
            f"{num_images!r} images of {len(prompts)} prompts; expected 1 to {MOST_IMAGES} in all"
        )
    seeds = _seeds(seed, total)
    every = [text for text in prompts for _ in range(num_images)]
    return [Request(text, negative_prompt, s) for text, s in zip(every, seeds, strict=True)]


def _seeds(seed: int | Sequence[int] | None, total: int) -> list[int]:
    if seed is None:
        seed = secrets.randbelow(2**32)
    seeds = [seed + i for i in range(total)] if isinstance(seed, int) else list(seed)
    if len(seeds) != total:
        raise UsageError(f"{len(seeds)} seeds for {total} pictures; give one each, or one in all")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            raise UsageError(f"seed {value!r}; expected a whole number from 0 to 2**64 - 1")
    return seeds


def load_pipeline(bundle: Bundle, candidate: Candidate) -> Pipeline:
    """Load a bundle's engines on the chosen backend; raises BackendError if one does not load."""
    assert candidate.load is not None
    names = ("text_encoder", "unet", "vae_decoder")
    manifest = bundle.manifest
    tokenizer = Tokenizer.from_folder(bundle.folder / "tokenizer", manifest.max_tokens)
    config = bundle.json("scheduler/scheduler_config.json")
    engines = {name: candidate.load(bundle, name) for name in names}
    return Pipeline(manifest, tokenizer, engines, config, candidate.title)
