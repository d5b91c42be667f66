"""A refiner: a model that continues what another has begun, as the one of SDXL does.

Podell et al. 2023 (arXiv:2307.01952), section 2.5. After a base it runs the last part of the run,
as the second of diffusers' two calls: with its own text encoder and UNet, the sampler and noise
schedule of the base, and the generator where the base left it. The base's decoder makes the image.

Knows manifests, options and a pipeline's stages; not the loop.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from sdrt.bundle.manifest import TIME_IDS, Manifest
from sdrt.errors import UsageError

from .batch import Batch, group_alike
from .conditioning_schedule import ConditioningSchedule
from .initial_latents import ImageInputs, LatentDistribution, build_initial_state
from .job import GenerationJob, RefinerPass
from .options import GenerationOptions
from .prompt_timeline import PromptTimeline
from .refiner_options import SCORES
from .requests import Request
from .textual_inversion.words import EmbeddingSet

# What two models must agree on for one to go on from the other's latents, with diffusers' defaults.
NOISE_SCHEDULE = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


class RefinerStages(Protocol):
    """What this module needs of the refiner's pipeline: see `PipelineStages`."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def bundle_config(self) -> Mapping[str, Any]: ...
    def build_job(
        self,
        requests: Sequence[Request],
        options: GenerationOptions,
        size: tuple[int, int],
        scheduler_config: Mapping[str, Any] | None = None,
        skipped_steps: int | None = None,
        denoising_start: float | None = None,
    ) -> GenerationJob: ...
    def encode_conditioning(
        self,
        requests: Sequence[Request],
        timelines: Sequence[PromptTimeline],
        options: GenerationOptions,
        size: tuple[int, int],
        embeddings: EmbeddingSet | None = None,
    ) -> list[ConditioningSchedule]: ...
    def latent_shape(self, job: GenerationJob) -> tuple[int, int, int]: ...


def check_refiner_task(manifest: Manifest, options: GenerationOptions, has_refiner: bool) -> None:
    """Raise UsageError for a run from noise of a refiner, and for a refiner that is not loaded."""
    if manifest.is_refiner and not options.starts_from_image:
        raise UsageError(
            f"{manifest.name} is a refiner without a base: it continues from an image",
            hint="pass image=... (--image FILE), or load a base with it (--bundle BASE --refiner "
            "NAME)",
        )
    if options.refiner_switch_at is not None and not has_refiner:
        raise UsageError(
            "refiner_switch_at without a refiner",
            hint="load one with sdrt.load(..., refiner=NAME) (--refiner NAME)",
        )


def check_refiner_fit(base: Manifest, refiner: Manifest) -> None:
    """Raise UsageError unless one bundle is a refiner and the other a base that it can follow."""
    if base.is_refiner:
        raise UsageError(
            f"{base.name} is a refiner, which cannot be the base of another",
            hint="load the base's bundle, and this one as its refiner",
        )
    if not refiner.is_refiner:
        raise UsageError(
            f"{refiner.name} is not a refiner: it reads no aesthetic score",
            hint="build one with `sdrt build --model stable-diffusion-xl-refiner-1.0`",
        )
    for what, own, expected in (
        ("latent channels", refiner.latent_channels, base.latent_channels),
        ("pixels a latent", refiner.downscale, base.downscale),
        ("time ids of the base", base.num_time_ids, TIME_IDS),
    ):
        if own != expected:
            raise UsageError(
                f"{refiner.name} cannot follow {base.name}: {own} {what}, expected {expected}",
                hint="load a base of the refiner's family, SDXL",
            )


def split_options(options: GenerationOptions) -> tuple[GenerationOptions, GenerationOptions]:
    """The options of the base's part of a run and of the refiner's."""
    scores: dict[str, Any] = dict.fromkeys(SCORES)
    base = replace(
        options, denoising_end=options.refiner_switch_at, refiner_switch_at=None, **scores
    )
    sizes: dict[str, Any] = {"target_size": None, "negative_target_size": None}
    return base, replace(options, refiner_switch_at=None, latents=None, **sizes)


def build_refiner_pass(
    refiner: RefinerStages, job: GenerationJob, options: GenerationOptions
) -> RefinerPass:
    """Validate the refiner's part of a run by its manifest alone.

    Args:
        refiner: Its pipeline.
        job: The base's part.
        options: Of the call.

    Raises:
        UsageError: For what does not fit it.
    """
    manifest, switch = refiner.manifest, options.refiner_switch_at
    assert switch is not None
    if any(side % manifest.multiple for side in job.size):
        raise UsageError(
            f"size {job.size[0]}x{job.size[1]} does not fit the refiner {manifest.name}",
            hint=f"pass multiples of {manifest.multiple}",
        )
    texts = [text for r in job.requests for text in (r.prompt, r.negative_prompt)]
    if used := job.embeddings.find_used(texts):
        raise UsageError(
            f"the prompt has the embedding {used[0].word}, which the refiner does not read",
            hint="leave the word out, or leave out refiner_switch_at",
        )
    _, own_options = split_options(options)
    own = refiner.build_job(
        (),
        own_options,
        job.size,
        _scheduler_config(refiner, job.scheduler_config),
        denoising_start=switch,
    )
    return RefinerPass(
        replace(
            own,
            evaluations_before=job.table.evaluations,
            first_evaluation=job.table.evaluations,
            continues_after=1 + job.table.num_noises,
        ),
        manifest.name,
        switch,
    )


def _scheduler_config(refiner: RefinerStages, base: Mapping[str, Any]) -> dict[str, Any]:
    """The base's sampler for what the refiner predicts; raises UsageError for a refiner of another
    noise schedule.
    """
    own = refiner.bundle_config
    for name, default in NOISE_SCHEDULE.items():
        if own.get(name, default) != base.get(name, default):
            raise UsageError(
                f"the refiner {refiner.manifest.name} has {name} {own.get(name, default)!r}, the "
                f"base {base.get(name, default)!r}: their latents have other noise",
                hint="load a refiner of the same noise schedule",
            )
    return {**base, "prediction_type": own.get("prediction_type", "epsilon")}


def prepare_refiner_batches(
    refiner: RefinerStages, job: GenerationJob, requests: Sequence[Request], latents: np.ndarray
) -> Iterator[Batch]:
    """The refiner's batches, of the latents [B, C, H/8, W/8] that the base hands over."""
    assert job.refiner is not None
    second = replace(job.refiner.job, requests=requests)
    timelines = {request: second.get_timeline(request) for request in requests}
    conditioning = refiner.encode_conditioning(
        requests, [*timelines.values()], second.options, second.size
    )
    by_request = dict(zip(requests, conditioning, strict=True))
    shape = refiner.latent_shape(second)
    zeros = np.zeros(shape, np.float32)
    starts = {
        request: ImageInputs(LatentDistribution(start, zeros))
        for request, start in zip(requests, latents, strict=True)
    }
    keys = {request: second.get_run_key(timeline) for request, timeline in timelines.items()}
    for group in group_alike(by_request, second.max_batch, keys.__getitem__):
        states = [build_initial_state(request, second, shape, starts[request]) for request in group]
        rows = [by_request[request] for request in group]
        yield Batch(group, rows, states, ImageInputs(), timelines[group[0]])
