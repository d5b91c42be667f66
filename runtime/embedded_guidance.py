"""Models that read the guidance scale as an embedding. Distilled from guided models, they have no
negative row.

Knows the embedding, and which options are meaningless then; the UNet's inputs decide which models.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdrt.bundle.manifest import Manifest
from sdrt.errors import UsageError

from .conditioning_schedule import ConditioningSchedule
from .options import GenerationOptions

log = logging.getLogger(__name__)
GUIDANCE = "timestep_cond"  # the UNet's input


def guidance_embedding_width(manifest: Manifest) -> int:
    """Width of the guidance scale's embedding; 0 where guidance is by a second row."""
    inputs = manifest.components["unet"].inputs
    return next((int(spec.shape[1]) for spec in inputs if spec.name == GUIDANCE), 0)


def guidance_embedding(scale: float, width: int) -> np.ndarray:
    """Embed a guidance scale: sinusoids of `1000 * (scale - 1)`, in single precision as diffusers.

    Returns:
        [width] float32.
    """
    half = width // 2
    step = np.log(np.float32(10000.0)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32(scale - 1.0) * np.float32(1000.0) * frequencies
    embedding = np.concatenate([np.sin(angles), np.cos(angles)])
    return np.pad(embedding, (0, width % 2)).astype(np.float32)


def without_guidance(options: GenerationOptions) -> GenerationOptions:
    """The options without guidance by a second row."""
    return replace(options, guidance_scale=1.0)


def add_guidance_embedding(
    conditioning: Sequence[ConditioningSchedule], options: GenerationOptions, width: int
) -> list[ConditioningSchedule]:
    """Add the guidance scale's embedding to every image's conditioning.

    Warns of a negative prompt: it has no effect, as in diffusers.
    """
    if any(options.negative_prompt) or options.negative_prompt_embeds is not None:
        log.warning("this model has no use for a negative prompt: it is ignored")
    embedding = guidance_embedding(options.guidance_scale, width)
    return [schedule.with_input(GUIDANCE, embedding) for schedule in conditioning]


def check_guidance(options: GenerationOptions) -> None:
    """Raise UsageError for options that are unsupported by such a model."""
    if tuple(options.guidance_interval) != (0.0, 1.0):
        raise UsageError(
            "guidance_interval is unsupported: this model reads one scale for the full run"
        )
    if options.guidance_rescale:
        raise UsageError("guidance_rescale is unsupported: this model has no second output")
